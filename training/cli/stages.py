"""The stages of the pipeline as commands, in the order of the data's way."""

import os
import sys
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer

from training.cli.options import Fork, LogJson, MaybeTenant, ProfileSteps, Set, Tenant
from training.cluster import pod
from training.config import Config, ConfigError
from training.errors import UserError
from training.params import load, tenants

ON_THE_CLUSTER = ("pretrain", "finetune")


def stage(name: str, config: Config, tenant: str | None = None, **options: Any) -> None:
    """Runs one stage, here or on the cluster. Its module is imported only now, so that `bit --help` answers at once."""
    arguments: Any = (tenant,) if tenant else ()
    if config.runner == "kubernetes" and name in ON_THE_CLUSTER and not pod.is_pod():
        if stated := [f"--{option}" for option, value in options.items() if value]:
            raise ConfigError(f"{' and '.join(stated)}: for a training that runs here only: --set runner=local.")
        import_module("training.submit").main(config, name, *arguments)
        return
    in_pod = pod.is_pod() and name in ON_THE_CLUSTER
    if in_pod:
        if pod.delivered():
            return
        options["deliver"] = partial(pod.deliver, name, tenant)
    import_module(f"training.{name}").main(config, *arguments, **options)
    if in_pod:
        pod.wait_for_delivery()


def pack(
    tenant: MaybeTenant = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse the whole when one picture cannot be read.")] = False,
    part: Annotated[
        str | None, typer.Option(metavar="NUMBER/COUNT", help="Pack one part, on one of many machines.")
    ] = None,
    merge: Annotated[int | None, typer.Option(metavar="COUNT", help="Join that many parts.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="URL", help="A DVC remote that gets the shards, for pods to read.")
    ] = None,
    overrides: Set = None,
) -> None:
    """Pictures → shards: the upstream pictures, or those of one tenant."""
    stated = [*(overrides or ()), *(["pack.strict=true"] if strict else [])]
    if part or merge:
        from training import parts

        config = load(tenant=tenant, overrides=stated)
        if part:
            parts.write(config, tenant, parts.parse(part))
        if merge:
            parts.merge(config, tenant, merge, push)
        return
    stage("pack", load(tenant=tenant, overrides=stated), tenant, push=push)


def pretrain(overrides: Set = None, fork: Fork = False, profile: ProfileSteps = 0, log_json: LogJson = False) -> None:
    """Shards → the upstream network, registered as bit-upstream. Adopts published weights where upstream.weights is set."""
    _speak_json(log_json)
    stage("pretrain", load(overrides=overrides or ()), fork=fork, profile=profile)


def finetune(
    tenant: MaybeTenant = None,
    all_tenants: Annotated[bool, typer.Option("--all", help="Every tenant, one after another in one process.")] = False,
    overrides: Set = None,
    fork: Fork = False,
    profile: ProfileSteps = 0,
    log_json: LogJson = False,
) -> None:
    """Upstream network + a tenant's shards → the tenant's network, by the HyperRule."""
    if (tenant is None) != all_tenants:
        raise ConfigError(f"name one tenant or give --all. Choices: {', '.join(tenants()) or 'none yet'}.")
    _speak_json(log_json)
    failed: dict[str, UserError] = {}
    for name in tenants() if all_tenants else [str(tenant)]:
        try:
            stage("finetune", load(tenant=name, overrides=overrides or ()), name, fork=fork, profile=profile)
        except UserError as error:
            if not all_tenants:
                raise
            failed[name] = error
            print(f"bit: {name}: {error}", file=sys.stderr)
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(tenants())} tenants failed: {', '.join(failed)}; the others are done."
        )


def evaluate(tenant: Tenant, overrides: Set = None) -> None:
    """A tenant's network on its test pictures → metrics, confusion matrix, the worst mistakes."""
    stage("evaluate", load(tenant=tenant, overrides=overrides or ()), tenant)


def export(tenant: Tenant, overrides: Set = None) -> None:
    """A tenant's network → the .onnx file that is served, checked against torch."""
    stage("export", load(tenant=tenant, overrides=overrides or ()), tenant)


def register(tenant: Tenant, overrides: Set = None) -> None:
    """The export → a version of the tenant's registered model in MLflow, alias challenger."""
    stage("register", load(tenant=tenant, overrides=overrides or ()), tenant)


def fleet(overrides: Set = None) -> None:
    """Every tenant's registered version in one table and one plot."""
    stage("fleet", load(overrides=overrides or ()))


def _speak_json(wanted: bool) -> None:
    if wanted:
        os.environ["BIT_LOG_JSON"] = "1"
