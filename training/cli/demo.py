"""The demo's commands."""

from pathlib import Path
from typing import Annotated

import typer

from training.params import load


def demo_data(
    force: Annotated[bool, typer.Option("--force", help="Draw again even where the pictures are there.")] = False,
) -> None:
    """Make the demo's three datasets and put them under DVC."""
    from training.demo import data

    if force or not data.is_there(Path()):
        data.write(Path())
        data.track(Path())


def demo_run() -> None:
    """Data, pipeline, promotion, service, and one picture of each tenant classified over HTTP."""
    from training.demo import walk

    walk.main(load())


def demo_seeds(count: Annotated[int, typer.Option(help="How many seeds.")] = 3) -> None:
    """Accuracy by transfer and from scratch over several seeds: median and spread, as the README shows them."""
    from training.demo import seeds

    seeds.main(load(), count)


COMMANDS = {"data": demo_data, "run": demo_run, "seeds": demo_seeds}
