"""Commands about the project as a whole: its configuration, its servers."""

from typing import Annotated

import typer
import yaml

from training.cli.options import Set
from training.params import load


def config(
    tenant: Annotated[str | None, typer.Option("--tenant", help="With this tenant's overrides.")] = None,
    overrides: Set = None,
) -> None:
    """Print the resolved values that the stages would use."""
    print(
        yaml.safe_dump(load(tenant=tenant, overrides=overrides or ()).model_dump(mode="json"), sort_keys=False), end=""
    )


def serve(
    port: Annotated[int, typer.Option(help="Port of the inference service.")] = 8080,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's server and UI.")] = 5000,
) -> None:
    """The inference service and MLflow's server with its UI, in the foreground, until Ctrl-C."""
    from training import serve as servers

    servers.main(load(), port, mlflow_port)
