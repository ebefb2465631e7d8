"""Commands about jobs on the cluster."""

from typing import Annotated

import typer
import yaml

from training.cli.options import Set
from training.errors import UserError
from training.params import load, tenants

Name = Annotated[str, typer.Argument(metavar="JOB", help="A job's name, as `bit jobs` shows it.")]


def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="pretrain or finetune.")],
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Whose network; finetune only.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Fine-tune every tenant.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--detach", help="Stay until it ends, or leave at once.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be applied; the cluster checks it.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Run a job that failed once more, from its checkpoint.")
    ] = False,
    overrides: Set = None,
) -> None:
    """Run pretrain or finetune on the cluster. The same work submitted twice is one job."""
    from training import submit as submission
    from training.cluster.jobs import Jobs
    from training.cluster.manifests import render

    if (stage == "finetune") != (tenant is not None or every):
        raise UserError("`bit submit finetune` takes a tenant (or --all), `bit submit pretrain` none.")
    if every:
        submission.fleet({name: load(tenant=name, overrides=overrides or ()) for name in tenants()}, retry)
        return
    config = load(tenant=tenant, overrides=overrides or ())
    if dry_run:
        objects = render(submission.order(config, stage, tenant), config.cluster)
        print(yaml.safe_dump_all(objects, sort_keys=False), end="")
        Jobs(config.cluster).apply(objects, dry_run=True)
    else:
        submission.main(config, stage, tenant, follow=follow, retry=retry)


def jobs(overrides: Set = None) -> None:
    """The jobs of the cluster's namespace and their states."""
    from training.cluster import explain
    from training.cluster.jobs import Jobs
    from training.submit import show

    found = Jobs(load(overrides=overrides or ()).cluster).find()
    show(
        [
            (job["metadata"]["labels"].get("bit/tenant", ""), job["metadata"]["name"], explain.condition(job))
            for job in found
        ]
    )


def logs(
    name: Name, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False
) -> None:
    """What rank 0 of a job prints."""
    from training.cluster.jobs import Jobs

    for line in Jobs(load().cluster).logs(f"{name}-worker-0", follow):
        print(line)


def attach(name: Name) -> None:
    """Follow a job that runs, to its end, and bring its receipt back."""
    from training import submit as submission
    from training.cluster.jobs import Jobs

    config = load()
    found = Jobs(config.cluster).get(name)
    if found is None:
        raise UserError(f"there is no job {name!r} in namespace {config.cluster.namespace!r}. `bit jobs` lists them.")
    labels = found["metadata"]["labels"]
    tenant = None if labels["bit/stage"] == "pretrain" else labels["bit/tenant"]
    submission.attach(config, Jobs(config.cluster), name, labels["bit/stage"], tenant)


def cancel(name: Name) -> None:
    """Remove a job with its pods. Its checkpoints stay: the same submission goes on from them."""
    from training.cluster.jobs import Jobs

    Jobs(load().cluster).delete(name)
    print(f"{name} removed; its checkpoints stay")
