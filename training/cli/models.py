"""Commands about registered models and architectures."""

from typing import Annotated

import typer

from training.cli.options import Tenant
from training.params import load


def promote(
    tenant: Tenant,
    wanted: Annotated[
        int | None, typer.Option("--version", help="Version to promote; default: the challenger.")
    ] = None,
) -> None:
    """Move the alias champion, after showing what is compared. Services follow within seconds."""
    from training import promote as promotion

    uri = load().tracking_uri
    compared = promotion.compare(uri, tenant, wanted)
    print("\n".join(compared.lines()))
    if compared.changes:
        promotion.apply(uri, compared)
        print(f"  alias champion → version {compared.candidate.version}")


def zoo() -> None:
    """The table of architectures."""
    from training.models.zoo import ARCHS, num_parameters

    print(f"{'arch':<9} {'units':<14} {'body':>13} {'1,000 classes':>15} {'21,843 classes':>15}")
    for name, arch in ARCHS.items():
        head = num_parameters(name, 1_000), num_parameters(name, 21_843)
        body = num_parameters(name, 1) - (head[1] - head[0]) // 20_843
        units = "-".join(map(str, arch.units))
        print(f"{name:<9} {units:<14} {body:>13,} {head[0]:>15,} {head[1]:>15,}")
