"""`python -m training <stage>`: what DVC and the pods run."""

from training.cli import main

main()
