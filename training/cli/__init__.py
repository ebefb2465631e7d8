"""The command `bit`: the table of its subcommands. Each is a function in a file of this folder; their order is the help's."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated, Any

import typer

from training.cli import demo, jobs, models, project, runs, stages, study, weights
from training.cluster import pod
from training.errors import UserError

COMMANDS = (
    stages.pack,
    stages.pretrain,
    stages.finetune,
    stages.evaluate,
    stages.export,
    stages.register,
    stages.fleet,
    runs.runs,
    models.promote,
    models.predict,
    weights.zoo,
    study.benchmark,
    jobs.submit,
    jobs.jobs,
    jobs.logs,
    jobs.attach,
    jobs.cancel,
    project.config,
    project.serve,
)
GROUPS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "demo": ("The demo: its data, and the whole way from pictures to answers over HTTP.", demo.COMMANDS),
    "weights": ("Weight files: import, export, show; published layouts and timm's.", weights.COMMANDS),
}


def build() -> typer.Typer:
    """The application, from the two tables above."""
    app = typer.Typer(
        name="bit",
        help="Big Transfer for many tenants: pre-train once, fine-tune every tenant, promote in MLflow, serve over HTTP.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(invoke_without_command=True)(options)
    for command in COMMANDS:
        app.command()(command)
    for name, (about, commands) in GROUPS.items():
        group = typer.Typer(help=about, no_args_is_help=True)
        for subname, command in commands.items():
            group.command(subname)(command)
        app.add_typer(group, name=name)
    return app


def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(version("bit-mlops"))
        raise typer.Exit


def main() -> None:
    """Runs the command line; an error that the user can mend ends with its message and its status, without a traceback."""
    if pod.is_pod():
        pod.prepare()
    try:
        with pod.last_words() if pod.is_pod() else nullcontext():
            build()()
    except UserError as error:
        print(f"bit: {error}", file=sys.stderr)
        sys.exit(error.status)
