"""Commands about registered models and architectures."""

from pathlib import Path
from typing import Annotated

import typer

from training.cli.options import Set, Tenant
from training.params import load


def promote(
    tenant: Tenant,
    wanted: Annotated[
        int | None, typer.Option("--version", help="Version to promote; default: the challenger.")
    ] = None,
    why: Annotated[str, typer.Option(help="The reason, for the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Promote though a gate fails; needs --why.")] = False,
    back: Annotated[bool, typer.Option("--rollback", help="Back to the version that the champion replaced.")] = False,
    past: Annotated[bool, typer.Option("--history", help="Print who moved the alias, when and why.")] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="Ask both with these pictures, not the packed test split.")
    ] = None,
    overrides: Set = None,
) -> None:
    """Move the alias champion once the gates hold: both versions answer the same pictures first. Services follow."""
    from rich.console import Console

    from training import promote as promotion

    config = load(overrides=overrides or ())
    if past:
        promotion.print_history(config, tenant, Console())
    elif back:
        print("\n".join(promotion.rollback(config, tenant, why)))
    else:
        print("\n".join(promotion.main(config, tenant, wanted, why, force, pictures)))


def zoo() -> None:
    """The table of architectures."""
    from training.models.zoo import ARCHS, num_parameters

    print(f"{'arch':<9} {'units':<14} {'body':>13} {'1,000 classes':>15} {'21,843 classes':>15}")
    for name, arch in ARCHS.items():
        head = num_parameters(name, 1_000), num_parameters(name, 21_843)
        body = num_parameters(name, 1) - (head[1] - head[0]) // 20_843
        units = "-".join(map(str, arch.units))
        print(f"{name:<9} {units:<14} {body:>13,} {head[0]:>15,} {head[1]:>15,}")
