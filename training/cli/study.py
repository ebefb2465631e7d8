"""The command that measures transfer."""

from typing import Annotated

import typer

from training.cli.options import Set
from training.params import load


def benchmark(
    suite: Annotated[str, typer.Option(help="demo, full, few-shot, vtab, ood, scaling or noise.")] = "demo",
    overrides: Set = None,
) -> None:
    """Transfer by the paper's protocols: results.csv, a plot and a Markdown table under runs/benchmark."""
    from training import benchmark

    benchmark.main(load(overrides=overrides or ()), suite)
