"""Commands about the project as a whole: its configuration, its servers."""

from typing import Annotated

import typer
import yaml

from training import receipt
from training.cli.options import Set
from training.config import ConfigError, PretrainConfig
from training.params import load
from training.recipes import RECIPES


def config(
    tenant: Annotated[str | None, typer.Option("--tenant", help="With this tenant's overrides.")] = None,
    overrides: Set = None,
) -> None:
    """Print the resolved values that the stages would use."""
    resolved = load(tenant=tenant, overrides=overrides or ())
    print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), end="")
    if resolved.pretrain.recipe:
        print(resulting(resolved.pretrain))


def resulting(stage: PretrainConfig) -> str:
    """What an upstream recipe comes to, on the packed pictures or, before they are packed, on the recipe's own."""
    assert stage.recipe is not None
    try:
        count, whose = int(receipt.read("pack").metrics["train_examples"]), "packed"
    except ConfigError:
        count, whose = RECIPES[stage.recipe].num_examples, "the recipe's own; nothing is packed yet"
    plan = stage.plan(count)
    warmup, *decays, end = plan.supports
    return (
        f"# pretrain by {stage.recipe} on {count:,} pictures ({whose}): {plan.steps:,} steps of {plan.global_batch:,}, "
        f"lr {plan.lr:g}, warm-up {warmup:,}, decays {', '.join(f'{step:,}' for step in decays)}, end {end:,}"
    )


def serve(
    port: Annotated[int, typer.Option(help="Port of the inference service.")] = 8080,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's server and UI.")] = 5000,
) -> None:
    """The inference service and MLflow's server with its UI, in the foreground, until Ctrl-C."""
    from training import serve as servers

    servers.main(load(), port, mlflow_port)
