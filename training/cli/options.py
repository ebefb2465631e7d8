"""Options and arguments that several commands share."""

from typing import Annotated

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of params.yaml; repeatable."),
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Name of a folder below tenants/.")]
MaybeTenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="A tenant; left out: upstream.")]
Fork = Annotated[
    bool,
    typer.Option("--fork", help="Start from the weights of an interrupted training whose values differ."),
]
ProfileSteps = Annotated[
    int, typer.Option("--profile", metavar="N", min=0, help="Write a torch profiler trace of N steps to trace.json.")
]
LogJson = Annotated[bool, typer.Option("--log-json", help="Progress as JSON lines, as BIT_LOG_JSON=1 does.")]
