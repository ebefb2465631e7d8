"""A stage on the cluster: submitted, or joined where it runs already, followed to its end, and its receipt brought back.

    bit submit pretrain
    bit submit finetune digits --detach

`pretrain` and `finetune` come here with `runner: kubernetes`. A job's name follows from what goes into it: what
runs is joined, what has ended is not run again, and two people who submit at once get one job.
"""

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from training import receipt
from training.cluster import explain, pod, results
from training.cluster.jobs import EVERYWHERE, PATIENCE_S, ClusterError, Jobs, Object
from training.cluster.manifests import Order, render
from training.cluster.orders import ended_before, order
from training.config import Config
from training.data import remote
from training.hyperrule import HyperRule

DETACHED = 130  # 128 + SIGINT


def main(config: Config, stage: str, tenant: str | None = None, *, follow: bool = True, retry: bool = False) -> None:
    """Submits a stage, or joins its job; with `follow` until it ends and its receipt is back.

    Raises ClusterError with the reason where the job failed.
    """
    jobs, wanted = Jobs(config.cluster, tenant), order(config, stage, tenant)
    found = jobs.get(wanted.name)
    if found and retry and explain.condition(found) == "Failed":
        _clear(config, jobs, wanted.name)
        found = None
    if found is None and not retry and ended_before(config, wanted.name):
        results.collect(config, [], {"metadata": {"name": wanted.name}}, stage, tenant)
        say(f"{wanted.name}: succeeded before and was removed; its receipt is back")
        return
    if found is None:
        jobs.apply(render(wanted, config.cluster))
        say(f"{wanted.name}: submitted to {jobs.host}, namespace {jobs.namespace}: {uses(config, wanted)}")
    else:
        say(f"{wanted.name}: {explain.condition(found).lower()} already; joined")
    if follow:
        attach(config, jobs, wanted.name, stage, tenant)


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
        raise ClusterError(f"{name} failed: {why(config, followed.ends, job, stage, tenant)}")
    results.collect(config, followed.pods, job, stage, tenant)
    say(f"{name}: succeeded; receipt in {receipt.folder(stage, tenant)}")


def why(config: Config, ends: list[Object], job: Object, stage: str, tenant: str | None) -> str:
    """Why a job failed, and the command for the next try."""
    url = f"{config.cluster.store}/{job['metadata']['name']}/{pod.WORDS}"
    told = explain.failed(ends, remote.text(url), job, stage, _examples_at_once(config, stage))
    again = " ".join(("bit submit", stage, *([tenant] if tenant else []), "--retry"))
    return f"{told}\nMend it, then: {again}"


def _examples_at_once(config: Config, stage: str) -> int | None:
    """Examples per forward pass; None where the machine chooses (`auto`)."""
    given = config.pretrain if stage == "pretrain" else config.finetune
    if given.micro_batch == "auto":
        return None
    nodes = config.cluster.nodes(stage)
    whole = given.global_batch or HyperRule.batch_size
    return given.micro_batch or max(1, whole // (nodes.workers * nodes.devices))


@dataclass
class Followed:
    """One job under a watch, which says what changes: its state, why it waits, what was started again; and the log of rank 0."""

    jobs: Jobs
    name: str
    ends: list[Object] = field(
        default_factory=list
    )  # how its containers ended, as last seen: a failed job loses its pods
    seen: dict[str, set[str]] = field(default_factory=dict)  # pod's name → uids that it had
    said: str = ""
    tail: threading.Thread | None = None

    def to_the_end(self) -> Object:
        job: Object = {}
        for news in self.jobs.watch(f"bit/job={self.name}"):
            job = news or job
            if not job:
                continue
            state = explain.condition(job)
            over = state in ("Succeeded", "Failed")
            try:
                self._look(job, state, over)
            except ClusterError:
                continue  # the watch says so itself, and comes back to it
            if over:
                if self.tail:
                    self.tail.join(timeout=5)
                return job
        raise AssertionError("a watch has no end")

    def _look(self, job: Object, state: str, over: bool) -> None:
        self.pods = pods = self.jobs.pods(self.name)
        self.ends = explain.terminated(pods) or self.ends
        for one in pods:
            self.seen.setdefault(one["metadata"]["name"], set()).add(one["metadata"]["uid"])
        if over:
            return
        running = state == "Running" and any(one["status"].get("phase") == "Running" for one in pods)
        now = "running" if running else "waiting: " + explain.waiting(job, pods, *self._told(job))
        replaced = sum(len(uids) - 1 for uids in self.seen.values())
        notes = [explain.restarts(pods), f"preempted or lost, and resumed {replaced} times" if replaced else ""]
        if noted := "; ".join(note for note in notes if note):
            now += f" ({noted})"
        if now != self.said:
            self.said = now
            say(f"{self.name}: {now}")
        if running and (self.tail is None or not self.tail.is_alive()):
            self.tail = threading.Thread(target=_print_logs, args=(self.jobs, f"{self.name}-worker-0"), daemon=True)
            self.tail.start()

    def _told(self, job: Object) -> tuple[list[str], list[Object]]:
        suspended = job.get("spec", {}).get("runPolicy", {}).get("suspend")
        return self.jobs.events(job["metadata"]["name"]), self.jobs.workloads() if suspended else []


def _print_logs(jobs: Jobs, pod: str) -> None:
    for line in jobs.logs(pod, follow=True):
        say(f"  {line}")


def fleet(configs: dict[str, Config], retry: bool = False) -> None:
    """Submits the fine-tuning of every tenant at once and follows all of them by one watch: one table, then a summary."""
    config = next(iter(configs.values()))
    jobs = Jobs(config.cluster)
    every = jobs.of(EVERYWHERE) if config.cluster.tenant_namespace else jobs
    orders = {tenant: order(given, "finetune", tenant) for tenant, given in configs.items()}
    there = {job["metadata"]["name"]: explain.condition(job) for job in every.find("bit/stage=finetune")}
    for tenant, wanted in orders.items():
        own = jobs.of(config.cluster.namespace_of(tenant))
        if retry and there.get(wanted.name) == "Failed":
            _clear(configs[tenant], own, wanted.name)
            there.pop(wanted.name)
        if wanted.name not in there:
            own.apply(render(wanted, configs[tenant].cluster))
    submitted = jobs.calls
    states = {wanted.name: "Created" for wanted in orders.values()}
    ended: dict[str, Object] = {}
    counted = ""
    for seen in every.watch("bit/stage=finetune"):
        if seen and (name := seen["metadata"]["name"]) in states:
            states[name] = explain.condition(seen)
            if states[name] in ("Succeeded", "Failed"):
                ended[name] = seen
        now = ", ".join(
            f"{list(states.values()).count(state)} {state.lower()}" for state in sorted(set(states.values()))
        )
        if now != counted:
            counted = now
            say(f"finetune, {len(states)} tenants: {now}")
        if len(ended) == len(states):
            break
    failures = []
    for tenant, wanted in orders.items():
        own = jobs.of(config.cluster.namespace_of(tenant))
        if states[wanted.name] == "Succeeded":
            pods = own.pods(wanted.name, PATIENCE_S)
            results.collect(configs[tenant], pods, ended[wanted.name], "finetune", tenant)
        else:
            failures.append(tenant)
    show([(tenant, wanted.name, states[wanted.name]) for tenant, wanted in orders.items()])
    say(f"{jobs.calls} requests to the API server, {submitted} of them to submit")
    if failures:
        raise ClusterError(
            f"{len(failures)} of {len(orders)} failed: {', '.join(failures)}. `bit attach JOB` says why; --retry runs them again."
        )


def _clear(config: Config, jobs: Jobs, name: str) -> None:
    """Removes a failed job and its last words; its checkpoints stay."""
    jobs.delete(name)
    while jobs.get(name):
        time.sleep(0.5)
    remote.remove(f"{config.cluster.store}/{name}/{pod.WORDS}")


def show(rows: Sequence[tuple[str, str, str]]) -> None:
    table = Table("tenant", "job", "state")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
