"""The command `bit`: one subcommand per stage, plus what people do around them."""

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from training.config import Config, load
from training.errors import UserError

app = typer.Typer(
    name="bit",
    help="Big Transfer for many tenants: pre-train once, fine-tune every tenant, promote in MLflow, serve over HTTP.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
demo = typer.Typer(
    help="The demo: its data, and the whole way from pictures to answers over HTTP.", no_args_is_help=True
)
app.add_typer(demo, name="demo")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of params.yaml; repeatable."),
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Name of a folder below tenants/.")]
MaybeTenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="A tenant; left out: upstream.")]


def stage(name: str, config: Config, *arguments: Any) -> None:
    """Runs one stage. Its module is imported only now, so that `bit --help` answers at once."""
    import_module(f"training.{name}").main(config, *arguments)


@app.command()
def pack(
    tenant: MaybeTenant = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the whole when one picture cannot be read.")] = False,
    overrides: Set = None,
) -> None:
    """Pictures → shards: the upstream pictures, or those of one tenant."""
    stated = [*(overrides or ()), *(["pack.strict=true"] if strict else [])]
    stage("pack", load(tenant=tenant, overrides=stated), tenant)


@app.command()
def pretrain(overrides: Set = None) -> None:
    """Shards → the upstream network, registered as bit-upstream. Adopts published weights where upstream.weights is set."""
    stage("pretrain", load(overrides=overrides or ()))


@app.command()
def finetune(tenant: Tenant, overrides: Set = None) -> None:
    """Upstream network + a tenant's shards → the tenant's network, by the HyperRule."""
    stage("finetune", load(tenant=tenant, overrides=overrides or ()), tenant)


@app.command()
def evaluate(tenant: Tenant, overrides: Set = None) -> None:
    """A tenant's network on its test pictures → metrics, confusion matrix, the worst mistakes."""
    stage("evaluate", load(tenant=tenant, overrides=overrides or ()), tenant)


@app.command()
def export(tenant: Tenant, overrides: Set = None) -> None:
    """A tenant's network → the .onnx file that is served, checked against torch."""
    stage("export", load(tenant=tenant, overrides=overrides or ()), tenant)


@app.command()
def register(tenant: Tenant, overrides: Set = None) -> None:
    """The export → a version of the tenant's registered model in MLflow, alias challenger."""
    stage("register", load(tenant=tenant, overrides=overrides or ()), tenant)


@app.command()
def fleet(overrides: Set = None) -> None:
    """Every tenant's registered version in one table and one plot."""
    stage("fleet", load(overrides=overrides or ()))


@app.command()
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


@app.command()
def config(
    tenant: Annotated[str | None, typer.Option("--tenant", help="With this tenant's overrides.")] = None,
    overrides: Set = None,
) -> None:
    """Print the resolved values that the stages would use."""
    print(
        yaml.safe_dump(load(tenant=tenant, overrides=overrides or ()).model_dump(mode="json"), sort_keys=False), end=""
    )


@app.command()
def zoo() -> None:
    """The table of architectures."""
    from training.models.zoo import ARCHS, num_parameters

    print(f"{'arch':<9} {'units':<14} {'body':>13} {'1,000 classes':>15} {'21,843 classes':>15}")
    for name, arch in ARCHS.items():
        head = num_parameters(name, 1_000), num_parameters(name, 21_843)
        body = num_parameters(name, 1) - (head[1] - head[0]) // 20_843
        units = "-".join(map(str, arch.units))
        print(f"{name:<9} {units:<14} {body:>13,} {head[0]:>15,} {head[1]:>15,}")


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port of the inference service.")] = 8080,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's server and UI.")] = 5000,
) -> None:
    """The inference service and MLflow's server with its UI, in the foreground, until Ctrl-C."""
    from training import serve as servers

    servers.main(load(), port, mlflow_port)


@demo.command("data")
def demo_data(
    force: Annotated[bool, typer.Option("--force", help="Draw again even where the pictures are there.")] = False,
) -> None:
    """Make the demo's three datasets and put them under DVC."""
    from training.demo import data

    if force or not data.is_there(Path()):
        data.write(Path())
        data.track(Path())


@demo.command("run")
def demo_run() -> None:
    """Data, pipeline, promotion, service, and one picture of each tenant classified over HTTP."""
    from training.demo import walk

    walk.main(load())


@demo.command("seeds")
def demo_seeds(count: Annotated[int, typer.Option(help="How many seeds.")] = 3) -> None:
    """Accuracy by transfer and from scratch over several seeds: median and spread, as the README shows them."""
    from training.demo import seeds

    seeds.main(load(), count)


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(version("bit-mlops"))
        raise typer.Exit


def main() -> None:
    """Runs the command line; an error that the user can mend ends with its message and status 2, without a traceback."""
    try:
        app()
    except UserError as error:
        print(f"bit: {error}", file=sys.stderr)
        sys.exit(2)
