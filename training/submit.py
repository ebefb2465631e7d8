"""A stage on the cluster: submitted, or joined where it runs already, followed to its end, and its receipt brought back.

    bit submit pretrain
    bit submit finetune digits --detach

`pretrain` and `finetune` come here with `runner: kubernetes`. A job's name follows from what goes into it: what
runs is joined, what has ended is not run again, and two people who submit at once get one job.
"""

import time
from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from training import receipt
from training.cluster import explain, pod, results
from training.cluster.following import FLEET, LOOK_S, Followed, follow_all, say
from training.cluster.jobs import EVERYWHERE, PATIENCE_S, ClusterError, Jobs, Object
from training.cluster.manifests import Order, render
from training.cluster.orders import ended_before, order
from training.config import Config
from training.data import remote
from training.errors import UserError
from training.hyperrule import HyperRule

DETACHED = 130  # 128 + SIGINT


class JobError(ClusterError):
    """A job that failed. status: the exit code of its container, 1 where that is no longer known."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def main(config: Config, stage: str, tenant: str | None = None, *, follow: bool = True, retry: bool = False) -> None:
    """Submits a stage, or joins its job; with `follow` until it ends and its receipt is back.

    Raises JobError with the reason where the job failed.
    """
    jobs, wanted = Jobs(config.cluster, tenant), order(config, stage, tenant)
    found = jobs.get(wanted.name)
    if found and retry and _is_in_vain(config, jobs, found, stage, tenant):
        _clear(config, jobs, found)
        found = jobs.get(wanted.name)  # somebody else's, who retried it at the same time
    if found is None and not retry and ended_before(config, wanted.name):
        results.collect(config, [], {"metadata": {"name": wanted.name}}, stage, tenant)
        say(f"{wanted.name}: succeeded before and was removed; its receipt is back")
        return
    if found is None:
        _refuse_two(wanted, jobs.find(f"bit/training={wanted.training}"))
        jobs.apply(render(wanted, config.cluster))
        say(f"{wanted.name}: submitted to {jobs.host}, namespace {jobs.namespace}: {uses(config, wanted)}")
    else:
        say(f"{wanted.name}: {explain.condition(found).lower()} already; joined")
    if follow or (found and explain.condition(found) in explain.OVER):
        attach(config, jobs, wanted.name, stage, tenant)


def _is_in_vain(config: Config, jobs: Jobs, job: Object, stage: str, tenant: str | None) -> bool:
    """Whether a job failed, or succeeded and its receipt is lost. Raises ClusterError where that cannot be told now."""
    if explain.condition(job) != "Succeeded":
        return explain.condition(job) == "Failed"
    try:
        results.collect(config, jobs.pods(job["metadata"]["name"], PATIENCE_S), job, stage, tenant)
    except results.LostReceipt:
        return True
    return False


def check(config: Config, jobs: Jobs, stage: str, tenant: str | None = None) -> None:
    """Prints what a submission would apply, and has the cluster take it for a trial: nothing is made or uploaded."""
    wanted = order(config, stage, tenant, upload=False)
    objects = render(wanted, config.cluster)
    print(yaml.safe_dump_all(objects, sort_keys=False, explicit_start=True), end="")
    jobs.of(config.cluster.namespace_of(tenant)).apply(objects, dry_run=True)
    say(f"{wanted.name}: would be taken by {jobs.host}: {uses(config, wanted)}")


def uses(config: Config, wanted: Order) -> str:
    """What a job takes of the cluster, in a line."""
    cluster, nodes = config.cluster, config.cluster.nodes(wanted.stage)
    what = "processes" if nodes.pool == "cpu" else "TPU chips" if nodes.pool == "tpu" else "GPUs"
    queue = f"queue {cluster.queue}" if cluster.queue else "no queue"
    return f"{nodes.workers} × ({nodes.devices} {what}, {nodes.cpu} cpu, {nodes.memory}) on pool {nodes.pool}, {queue}"


def attach(config: Config, jobs: Jobs, name: str, stage: str, tenant: str | None) -> None:
    """Watches a job to its end; brings its receipt back. Ctrl-C leaves the job running."""
    followed = Followed(jobs, name)
    try:
        job = followed.to_the_end()
    except KeyboardInterrupt:
        say(f"\ndetached; {name} goes on. Come back with: bit attach {name}")
        raise SystemExit(DETACHED) from None
    if explain.condition(job) == "Failed":
        again = " ".join(("bit submit", stage, *([tenant] if tenant else []), "--retry"))
        told = f"{name} failed: {why(config, followed.ends, job, stage)}\nMend it, then: {again}"
        raise JobError(told, explain.exit_code(followed.ends))
    if explain.condition(job) == "Removed":
        raise ClusterError(f"{name} was removed: {why(config, [], job, stage)}")
    results.collect(config, followed.pods, job, stage, tenant)
    say(f"{name}: succeeded; receipt in {receipt.folder(stage, tenant)}")


def why(config: Config, ends: list[Object], job: Object, stage: str) -> str:
    """Why a job failed. ends: how its containers ended, where they are known."""
    if explain.condition(job) == "Removed":
        return "somebody cancelled it, or submitted it anew; the same command goes on from its checkpoints, or joins it"
    words = remote.text(f"{results.store_of(config, job)}/{pod.WORDS}")
    return explain.failed(ends, words, job, stage, _examples_at_once(config, stage))


def _examples_at_once(config: Config, stage: str) -> int | None:
    """Examples per forward pass; None where the machine chooses (`auto`)."""
    given = config.pretrain if stage == "pretrain" else config.finetune
    if given.micro_batch == "auto":
        return None
    nodes = config.cluster.nodes(stage)
    whole = given.global_batch or HyperRule.batch_size
    return given.micro_batch or max(1, whole // (nodes.workers * nodes.devices))


def fleet(configs: dict[str, Config], *, follow: bool = True, retry: bool = False, look_s: float = LOOK_S) -> None:
    """Submits the fine-tuning of every tenant at once; with `follow` all of them by one watch: one table, then a summary.

    A tenant that cannot be submitted leaves the others theirs. Raises JobError with the reason of each that failed.
    """
    config = next(iter(configs.values()))
    jobs = Jobs(config.cluster)
    every = jobs.of(EVERYWHERE) if config.cluster.tenant_namespace else jobs
    failures: dict[str, str] = {}
    ends: dict[str, list[Object]] = {}
    try:
        names, ended = _submit_all(configs, jobs, every, retry, failures)
        submitted = jobs.calls
        if follow and len(ended) < len(names):
            ends = follow_all(set(names.values()), every, ended, look_s)
    except KeyboardInterrupt:
        say("\ndetached; the jobs go on. Come back with: bit submit finetune --all")
        raise SystemExit(DETACHED) from None
    if follow:
        for tenant, name in names.items():
            try:
                job = ended[name]
                if explain.condition(job) != "Succeeded":
                    raise ClusterError(why(configs[tenant], ends.get(name, []), job, "finetune"))
                own = jobs.of(config.cluster.namespace_of(tenant))
                pods = own.pods(name, PATIENCE_S) if "spec" in job else []  # else it ended and was removed before
                results.collect(configs[tenant], pods, job, "finetune", tenant)
            except ClusterError as error:
                failures[tenant] = str(error)
        show([(tenant, name, explain.condition(ended[name])) for tenant, name in names.items()])
        say(f"{jobs.calls} requests to the API server, {submitted} of them to submit")
    else:
        still = len(names) - len(ended)
        say(f"{still} jobs are there, {len(ended)} ended before. `bit submit finetune --all` follows them.")
    if failures:
        told = "\n".join(f"{tenant}: {reason.splitlines()[-1]}" for tenant, reason in failures.items())
        raise JobError(f"{len(failures)} of {len(configs)} failed; --retry runs them again:\n{told}")


def _submit_all(
    configs: dict[str, Config], jobs: Jobs, every: Jobs, retry: bool, failures: dict[str, str]
) -> tuple[dict[str, str], dict[str, Object]]:
    """Submits what is not there yet. failures: gets the reason of each tenant that cannot be.

    Returns the jobs' names by tenant, and what need not run: jobs that ended, were removed and left their receipt.
    """
    names: dict[str, str] = {}
    ended: dict[str, Object] = {}
    found = every.find(FLEET)
    there = {job["metadata"]["name"]: job for job in found}
    for tenant, config in configs.items():
        own = jobs.of(config.cluster.namespace_of(tenant))
        try:
            wanted = order(config, "finetune", tenant)
            _refuse_two(wanted, found)
            job = there.get(wanted.name)
            if job and retry and _is_in_vain(config, own, job, "finetune", tenant):
                _clear(config, own, job)
                job = None
            if job is None and not retry and ended_before(config, wanted.name):
                done = {"type": "Succeeded", "status": "True"}
                ended[wanted.name] = {"metadata": {"name": wanted.name}, "status": {"conditions": [done]}}
            elif job is None:
                own.apply(render(wanted, config.cluster))
            names[tenant] = wanted.name
        except (UserError, OSError) as error:
            failures[tenant] = str(error)
            say(f"{tenant}: {error}")
    return names, ended


def _refuse_two(wanted: Order, found: list[Object]) -> None:
    """Two live jobs of one training would overwrite each other's checkpoints. Raises ClusterError."""
    for job in found:
        name, training = job["metadata"]["name"], job["metadata"]["labels"].get("bit/training")
        if training == wanted.training and name != wanted.name and explain.condition(job) not in explain.OVER:
            raise ClusterError(
                f"{name} is the same training with another image, micro_batch or the like, and still there: `bit attach {name}` "
                f"follows it; after `bit cancel {name}` {wanted.name} goes on from its checkpoint."
            )


def _clear(config: Config, jobs: Jobs, job: Object) -> None:
    """Removes a job that ended in vain, and what it left in the store, but its checkpoints. Somebody else may be first."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    if not jobs.delete(name, uid):
        return
    while (left := jobs.get(name)) and left["metadata"]["uid"] == uid:
        time.sleep(0.5)
    for file in (pod.WORDS, receipt.FILE):
        remote.remove(f"{results.store_of(config, job)}/{file}")


def show(rows: Sequence[tuple[str, str, str]]) -> None:
    table = Table("tenant", "job", "state")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
