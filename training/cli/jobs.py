"""Commands about jobs on the cluster."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.cli.options import Set
from training.config import ClusterConfig
from training.errors import UserError
from training.params import load, tenants

if TYPE_CHECKING:
    from training.cluster.jobs import Jobs

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

    if (stage == "finetune") != (tenant is not None or every) or (tenant is not None and every):
        raise UserError("`bit submit finetune` takes a tenant or --all, `bit submit pretrain` neither.")
    chosen = tenants() if every else [tenant]
    if not chosen:
        raise UserError("there is no tenant yet: add tenants/NAME/params.yaml and its pictures.")
    configs = {name: load(tenant=name, overrides=overrides or ()) for name in chosen}
    if dry_run:
        jobs = Jobs(next(iter(configs.values())).cluster)
        for name, config in configs.items():
            submission.check(config, jobs, stage, name)
    elif every:
        submission.fleet({str(name): config for name, config in configs.items()}, follow=follow, retry=retry)
    else:
        submission.main(configs[tenant], stage, tenant, follow=follow, retry=retry)


def jobs(overrides: Set = None) -> None:
    """The jobs of the project and their states."""
    from training.cluster import explain
    from training.submit import show

    rows = []
    for job in _everywhere(load(overrides=overrides or ()).cluster).find():
        rows.append((job["metadata"]["labels"].get("bit/tenant", ""), job["metadata"]["name"], explain.condition(job)))
    show(rows)


def logs(
    name: Name, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False
) -> None:
    """What rank 0 of a job prints."""
    empty = True
    for _, line in _find(load().cluster, name)[0].logs(f"{name}-worker-0", follow):
        empty = False
        print(line)
    if empty:
        print(
            f"{name}-worker-0 has no log: it has not started yet, or it is gone. `bit jobs` says which.",
            file=sys.stderr,
        )


def attach(name: Name) -> None:
    """Follow a job that runs, to its end, and bring its receipt back."""
    from training import submit as submission

    config = load()
    jobs, found = _find(config.cluster, name)
    labels = found["metadata"]["labels"]
    if "bit/stage" not in labels:
        raise UserError(
            f"{name} was not made by `bit submit`; its receipt stays in the store. `bit logs {name}` shows its log."
        )
    tenant = None if labels["bit/stage"] == "pretrain" else labels["bit/tenant"]
    submission.attach(config, jobs, name, labels["bit/stage"], tenant)


def cancel(name: Name) -> None:
    """Remove a job with its pods. Its checkpoints stay: the same submission goes on from them."""
    _find(load().cluster, name)[0].delete(name)
    print(f"{name} removed; its checkpoints stay")


def _everywhere(cluster: ClusterConfig) -> "Jobs":
    """The jobs of all namespaces that the project uses."""
    from training.cluster.jobs import EVERYWHERE, Jobs

    jobs = Jobs(cluster)
    return jobs.of(EVERYWHERE) if cluster.tenant_namespace else jobs


def _find(cluster: ClusterConfig, name: str) -> tuple["Jobs", dict[str, Any]]:
    """A job by its name, and the jobs of its namespace. Raises UserError where there is none."""
    jobs = _everywhere(cluster)
    found = [job for job in jobs.find() if job["metadata"]["name"] == name]
    if not found:
        where = f"a namespace like {cluster.tenant_namespace!r}" if cluster.tenant_namespace else cluster.namespace
        raise UserError(f"there is no job {name!r} in {where}. `bit jobs` lists them.")
    return jobs.of(found[0]["metadata"]["namespace"]), found[0]
