"""A stage on the cluster: from params.yaml and the receipts before it to a PyTorchJob, and from the job's end to its receipt.

    bit submit pretrain
    bit submit finetune digits --detach

`pretrain` and `finetune` come here with `runner: kubernetes`. A job's name follows from what goes into it: what
runs is joined, what has ended is not run again, and two people who submit at once get one job.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import yaml
from rich.console import Console
from rich.table import Table

from training import receipt
from training.cluster import explain
from training.cluster.jobs import ClusterError, Jobs, Object
from training.cluster.manifests import Order, render
from training.config import TENANT_SECTIONS, Config, ConfigError
from training.data import remote

STAGES = ("pretrain", "finetune")
DETACHED = 130  # 128 + SIGINT


def order(config: Config, stage: str, tenant: str | None) -> Order:
    """What the job is to do. Uploads packed pictures to the DVC remote, where pods read them by content hash."""
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} does not run on the cluster. Choices: {', '.join(STAGES)}.")
    cluster = config.cluster
    before = {"pack": receipt.read("pack", tenant)} | ({"pretrain": receipt.read("pretrain")} if tenant else {})
    sections = [config.upstream, getattr(config, stage), cluster.image]
    hashes = [artifact.sha256 for made in before.values() for artifact in made.outputs.values()]
    digest = receipt.hash_of(*sections, *hashes)[:10]
    name = "-".join(["bit", stage, *([tenant[:24].strip("-")] if tenant else []), digest])

    params = config.model_dump(mode="json", include={"upstream", stage}, exclude_defaults=True)
    params["tracking_uri"] = cluster.tracking_uri or config.tracking_uri
    files = {}
    if tenant:
        own = {section: params.pop(section) for section in TENANT_SECTIONS if section in params}
        files[f"tenants/{tenant}/params.yaml"] = yaml.safe_dump({"tenant": tenant, **own}, sort_keys=False)
    files["params.yaml"] = yaml.safe_dump(params, sort_keys=False)
    for earlier, made in before.items():
        path = receipt.folder(earlier, tenant if earlier == "pack" else None) / receipt.FILE
        files[path.as_posix()] = _reachable(made, config, name).model_dump_json(indent=1)
    return Order(name, stage, tenant, files)


def _reachable(made: receipt.Receipt, config: Config, name: str) -> receipt.Receipt:
    """A receipt whose artifacts pods can read: what lies on this machine's disk is uploaded first."""
    outputs = {}
    for key, artifact in made.outputs.items():
        if "://" in artifact.uri:
            continue  # it lies where pods can reach it
        if Path(artifact.uri).is_dir():
            if config.cluster.remote is None:
                raise ConfigError("cluster.remote is not set: the URL of the DVC remote that pods read pictures from.")
            uri = remote.push(Path(artifact.uri), config.cluster.remote)
        else:
            uri = f"{config.cluster.store}/{name}/inputs/{Path(artifact.uri).name}"
            remote.upload(Path(artifact.uri), uri)
        outputs[key] = artifact.model_copy(update={"uri": uri})
    return made.model_copy(update={"outputs": made.outputs | outputs})


def main(config: Config, stage: str, tenant: str | None = None, *, follow: bool = True, retry: bool = False) -> None:
    """Submits a stage, or joins its job; with `follow` until it ends and its receipt is back.

    Raises ClusterError with the reason where the job failed.
    """
    jobs, wanted = Jobs(config.cluster), order(config, stage, tenant)
    found = jobs.get(wanted.name)
    state = explain.condition(found) if found else ""
    if state == "Failed" and retry:
        jobs.delete(wanted.name)
        while jobs.get(wanted.name):
            time.sleep(0.5)
        found = None
    if found is None and not retry and ended_before(config, wanted.name):
        collect(config, jobs, {"metadata": {"name": wanted.name}}, stage, tenant)
        print(f"{wanted.name}: succeeded before and was removed; its receipt is back", file=sys.stderr)
        return
    if found is None:
        objects = render(wanted, config.cluster)
        jobs.apply(objects)
        print(f"{wanted.name}: submitted to {jobs.host}, namespace {jobs.namespace}", file=sys.stderr)
    else:
        print(f"{wanted.name}: {state.lower()} already; joined", file=sys.stderr)
    if follow:
        attach(config, jobs, wanted.name, stage, tenant)


def attach(config: Config, jobs: Jobs, name: str, stage: str, tenant: str | None) -> None:
    """Watches a job to its end; brings its receipt back. Ctrl-C leaves the job running."""
    try:
        job = _until_the_end(jobs, name)
    except KeyboardInterrupt:
        print(f"\ndetached; {name} goes on. Come back with: bit attach {name}", file=sys.stderr)
        raise SystemExit(DETACHED) from None
    if explain.condition(job) == "Failed":
        why = explain.failed(jobs.pods(name), job, getattr(config, stage).micro_batch)
        again = " ".join(("bit submit", stage, *([tenant] if tenant else []), "--retry"))
        raise ClusterError(f"{name} failed: {why}\nMend it, then: {again}")
    collect(config, jobs, job, stage, tenant)
    print(f"{name}: succeeded; receipt in {receipt.folder(stage, tenant)}", file=sys.stderr)


def _until_the_end(jobs: Jobs, name: str) -> Object:
    """Watches one job and says what changes: its state, why it waits, how often it was started again, the log of rank 0."""
    job: Object = {}
    said, tail = "", None
    for seen in jobs.watch(f"bit/job={name}"):
        job = seen or job
        state = explain.condition(job) if job else "Created"
        if state in ("Succeeded", "Failed"):
            if tail:
                tail.join(timeout=5)
            return job
        if not job:
            continue
        try:
            pods = jobs.pods(name)
            running = state == "Running" and any(pod["status"].get("phase") == "Running" for pod in pods)
            now = "running" if running else "waiting: " + explain.waiting(job, pods, *_told(jobs, job))
            if again := explain.restarts(pods):
                now += f" (started again {again} times)"
        except ClusterError:
            continue  # the watch says so itself
        if now != said:
            said = now
            print(f"{name}: {now}", file=sys.stderr)
        if running and (tail is None or not tail.is_alive()):
            tail = threading.Thread(target=_print_logs, args=(jobs, f"{name}-worker-0"), daemon=True)
            tail.start()
    raise AssertionError("a watch has no end")


def _told(jobs: Jobs, job: Object) -> tuple[list[str], Object | None]:
    suspended = job.get("spec", {}).get("runPolicy", {}).get("suspend")
    return jobs.events(job["metadata"]["name"]), jobs.workload(job["metadata"]["uid"]) if suspended else None


def _print_logs(jobs: Jobs, pod: str) -> None:
    for line in jobs.logs(pod, follow=True):
        print(f"  {line}", file=sys.stderr)


def collect(config: Config, jobs: Jobs, job: Object, stage: str, tenant: str | None) -> None:
    """The receipt of a job that succeeded, into the stage's folder; checked against the hash that its pod left, if one did."""
    name = job["metadata"]["name"]
    url, expected = f"{config.cluster.store}/{name}/{receipt.FILE}", None
    for pod in jobs.pods(name):
        for status in pod.get("status", {}).get("containerStatuses") or ():
            message = ((status.get("state") or {}).get("terminated") or {}).get("message") or ""
            if message.startswith("{"):
                told = json.loads(message)
                url, expected = told["receipt"], told["sha256"]
    try:
        fs, path = fsspec.core.url_to_fs(url)
        data = fs.cat_file(path)
    except (OSError, ValueError) as error:
        raise ClusterError(f"{name} succeeded, but its receipt {url} cannot be read: {error}") from error
    if expected not in (None, hashlib.sha256(data).hexdigest()):
        raise ClusterError(f"{url} is not what the pod wrote: it was damaged or replaced. Submit again with --retry.")
    made = receipt.Receipt.model_validate_json(data)
    folder = receipt.folder(stage, tenant)
    folder.mkdir(parents=True, exist_ok=True)
    for small in fs.glob(path.replace(receipt.FILE, "*.png")):
        (folder / small.rpartition("/")[2]).write_bytes(fs.cat_file(small))
    told_by = {"job": name} | ({"job_uid": uid} if (uid := job["metadata"].get("uid")) else {})
    details: dict[str, Any] = made.details | told_by
    made.model_copy(update={"details": details}).write(folder)


def ended_before(config: Config, name: str) -> bool:
    """Whether a job of this name left its receipt in the store, though the job itself is gone."""
    fs, path = fsspec.core.url_to_fs(f"{config.cluster.store}/{name}/{receipt.FILE}")
    return bool(fs.exists(path))


def fleet(configs: dict[str, Config], retry: bool = False) -> None:
    """Submits the fine-tuning of every tenant at once and follows all of them by one watch: one table, then a summary."""
    config = next(iter(configs.values()))
    jobs = Jobs(config.cluster)
    orders = {tenant: order(given, "finetune", tenant) for tenant, given in configs.items()}
    there = {job["metadata"]["name"]: explain.condition(job) for job in jobs.find("bit/stage=finetune")}
    for tenant, wanted in orders.items():
        if retry and there.get(wanted.name) == "Failed":
            jobs.delete(wanted.name)
            there.pop(wanted.name)
        if wanted.name not in there:
            jobs.apply(render(wanted, configs[tenant].cluster))
    submitted = jobs.calls
    states = {wanted.name: "Created" for wanted in orders.values()}
    ended: dict[str, Object] = {}
    counted = ""
    for seen in jobs.watch("bit/stage=finetune"):
        if seen and (name := seen["metadata"]["name"]) in states:
            states[name] = explain.condition(seen)
            if states[name] in ("Succeeded", "Failed"):
                ended[name] = seen
        now = ", ".join(
            f"{list(states.values()).count(state)} {state.lower()}" for state in sorted(set(states.values()))
        )
        if now != counted:
            counted = now
            print(f"finetune, {len(states)} tenants: {now}", file=sys.stderr)
        if len(ended) == len(states):
            break
    failures = []
    for tenant, wanted in orders.items():
        if states[wanted.name] == "Succeeded":
            collect(configs[tenant], jobs, ended[wanted.name], "finetune", tenant)
        else:
            failures.append(tenant)
    show([(tenant, wanted.name, states[wanted.name]) for tenant, wanted in orders.items()])
    print(f"{jobs.calls} requests to the API server, {submitted} of them to submit", file=sys.stderr)
    if failures:
        raise ClusterError(
            f"{len(failures)} of {len(orders)} failed: {', '.join(failures)}. `bit attach JOB` says why; --retry runs them again."
        )


def show(rows: Sequence[tuple[str, str, str]]) -> None:
    table = Table("tenant", "job", "state")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
