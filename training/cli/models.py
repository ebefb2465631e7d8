"""Commands about registered models."""

from pathlib import Path
from typing import Annotated

import typer

from training.cli.options import Set, Tenant
from training.config import ConfigError
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
        Path | None,
        typer.Option(
            help="Ask both with these pictures, not the packed test split. Folders named like classes are labels."
        ),
    ] = None,
    overrides: Set = None,
) -> None:
    """Move the alias champion once the gates hold: both versions answer the same pictures first. Services follow."""
    from rich.console import Console

    from training import promote as promotion
    from training import tracking

    config = load(overrides=overrides or ())
    with tracking.asked(config.tracking_uri):
        if past:
            promotion.print_history(config, tenant, Console())
        elif back:
            print("\n".join(promotion.rollback(config, tenant, why)))
        else:
            print("\n".join(promotion.main(config, tenant, wanted, why, force, pictures)))


def predict(
    tenant: Tenant,
    source: Annotated[
        str, typer.Argument(help="Folder, picture, CSV with the column path, shards, or a URL of these.")
    ],
    out: Annotated[str, typer.Option(help="The answers: a Parquet file, path or URL.")],
    version: Annotated[int | None, typer.Option(help="A version of the registry.")] = None,
    alias: Annotated[str, typer.Option(help="The version with this alias.")] = "champion",
    models: Annotated[
        Path | None, typer.Option(help="An export, or a folder of TENANT.onnx, instead of the registry.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes kept for each picture.")] = 5,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    index: Annotated[int, typer.Option("--slice", min=0, envvar="JOB_COMPLETION_INDEX", help="Which slice.")] = 0,
    slices: Annotated[int, typer.Option(min=1, help="Cut the pictures into so many; each writes its own file.")] = 1,
    run: Annotated[
        str,
        typer.Option(envvar="BIT_PREDICT_RUN", help="A name that the slices share: all use the version of the first."),
    ] = "",
    overrides: Set = None,
) -> None:
    """Answer many pictures without HTTP; a run that was killed goes on where it was."""
    import os

    from training import predict as prediction

    if index >= slices:
        raise ConfigError(f"--slice {index}: with --slices {slices} it is 0 to {slices - 1}.")
    export = (
        prediction.read_export(models, tenant)
        if models
        else prediction.find_export(load(overrides=overrides or ()), tenant, version, alias, out, run)
    )
    threads = workers or len(os.sched_getaffinity(0))
    count, errors = prediction.main(tenant, export, source, out, top, threads, index, slices)
    print(
        f"{count:,} pictures answered by version {export.version}, {errors:,} of them could not be read (column error)"
    )
