"""`runner: kubernetes` end to end: dvc repro, jobs through the real API server and operator, pods' commands as real processes."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import K8S, VOLUME
from tests.cluster.kubelet import Kubelet
from tests.cluster.projects import CPU, ROOT, TENANT, Command, bit, drawn, edit, fresh, project, receipt, run
from tests.clusters import Cluster, wait_for
from training import tracking

pytestmark = pytest.mark.heavy
STAGES = ("pretrain", "finetune/digits", "evaluate/digits")
LONG = {"steps": 300, "checkpoint_every": 20, "evaluate_every": 300}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("template") / "project")


@pytest.fixture(scope="module")
def kubelet(prepared: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    running = Kubelet(prepared, tmp_path_factory.mktemp("pods"), ROOT)
    running.start()
    yield running
    running.stop()


def only_job(cluster: Cluster, seed: int) -> str:
    """The name of the one job whose upstream training has this seed."""
    jobs = {made["metadata"]["name"] for made in cluster.get("pytorchjobs", "-n", "bit")["items"]}
    maps = {made["metadata"]["name"]: made["data"] for made in cluster.get("configmaps", "-n", "bit")["items"]}
    [name] = [name for name in jobs if f"seed: {seed}\n" in maps[name]["params.yaml"]]
    return name


@pytest.fixture(scope="module")
def tenant_namespace(prepared: Cluster) -> str:
    """The namespace of the tenant, as a copy of k8s/tenant makes it."""
    objects = prepared.kubectl("kustomize", str(K8S / "tenant")).replace("acme", TENANT)
    volume = VOLUME.replace("name: checkpoints", f"name: {TENANT}").replace(
        "namespace: bit", f"namespace: bit-{TENANT}"
    )
    prepared.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=f"{objects}\n---{volume}")
    return f"bit-{TENANT}"


def test_dvc_repro_on_the_cluster_gives_what_it_gives_here(
    prepared: Cluster, kubelet: Kubelet, tenant_namespace: str, tmp_path: Path
) -> None:
    seed = drawn()
    template = fresh(tmp_path / "template", demo=True)
    steps = {"pretrain": {"steps": 40, "global_batch": 32}, "finetune": {"scratch": False, "steps": 60}}
    given = {"tenant_namespace": "bit-{tenant}"}
    there = project(template, tmp_path / "there", tmp_path / "store", seed=seed, cluster=given, **steps)
    here = project(template, tmp_path / "here", tmp_path / "store", seed=seed, runner="local", **steps)
    target = ("-m", "dvc", "repro", "tenants/digits/dvc.yaml:evaluate")
    beside = Command(here, None, tmp_path / "here.log", *target)
    run(there, *target, cluster=prepared)
    beside.end()
    for stage in STAGES:
        ours, theirs = receipt(here, stage), receipt(there, stage)
        assert set(theirs) == set(ours)
        for name, value in ours["metrics"].items():
            if not name.endswith(("seconds", "_gb")):
                assert theirs["metrics"][name] == value, name
    made = receipt(there, "pretrain")
    assert made["outputs"]["weights"]["uri"].startswith("file://")
    [job] = prepared.get("pytorchjobs", "-n", "bit", "-l", f"bit/job={made['details']['job']}")["items"]
    tags = tracking.connect(f"sqlite:///{there}/.mlflow/mlflow.db").get_run(made["run_id"]).data.tags
    assert tags["k8s.job"] == job["metadata"]["name"]
    assert tags["k8s.job_uid"] == made["details"]["job_uid"] == job["metadata"]["uid"]
    assert tags["k8s.pool"] == "cpu"
    assert tags["k8s.image"].startswith("bit-training@sha256:")
    assert tags["k8s.node"].startswith("cpu-")
    assert tags["dvc.md5"].endswith(".dir")
    [tuned] = prepared.get("pytorchjobs", "-n", tenant_namespace)["items"]
    assert receipt(there, "finetune/digits")["details"]["job_uid"] == tuned["metadata"]["uid"]
    assert tuned["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 1
    assert tuned["metadata"]["name"] in bit(there, prepared, "jobs")
    assert "Running stage" not in run(there, *target, cluster=prepared)
    assert "succeeded already; joined" in bit(there, prepared, "submit", "pretrain")


def test_a_killed_repro_attaches_and_lost_workers_resume(
    prepared: Cluster, submitter: Cluster, kubelet: Kubelet, template: Path, tmp_path: Path
) -> None:
    seed = drawn()
    two = {"pretrain": CPU | {"workers": 2}}
    long = {**LONG, "steps": 1200, "evaluate_every": 1200}  # a worker is made anew twice meanwhile, each time in 10 s
    root = project(template, tmp_path / "p", tmp_path / "store", seed=seed, pretrain=long, cluster=two)
    first = Command(root, submitter, tmp_path / "first.log", "-m", "dvc", "repro", "pretrain")
    wait_for(lambda: "running" in first.log or first.process.poll() is not None)
    job = only_job(prepared, seed)
    wait_for(lambda: list(kubelet.folder.glob(f"{job}/checkpoints/**/step-*")))
    first.kill()
    victim = kubelet.container(f"{job}-worker-1")
    assert victim is not None
    victim.kill()  # restarted in place, as a kubelet does
    wait_for(lambda: victim.restarts == 1)
    again = Command(root, submitter, tmp_path / "again.log", "-m", "dvc", "repro", "pretrain")
    wait_for(lambda: "resumed after step" in kubelet.log(f"{job}-worker-0"))
    prepared.kubectl("delete", "pod", f"{job}-worker-1", "-n", "bit")  # as at a preemption; the operator makes it anew
    wait_for(lambda: len(kubelet.all_of(f"{job}-worker-1")) == 2)
    said = again.end()
    assert "joined" in said
    assert "succeeded" in said
    assert only_job(prepared, seed) == job
    assert kubelet.log(f"{job}-worker-0").count("resumed after step") >= 2


def test_why_a_job_waits_and_fails_is_told_in_plain_words(
    prepared: Cluster, submitter: Cluster, kubelet: Kubelet, template: Path, tmp_path: Path
) -> None:
    seed, other_seed, late_seed = drawn(), drawn(), drawn()
    root = project(template, tmp_path / "p", tmp_path / "store", seed=seed)
    edit(root, lambda job: job["spec"]["runPolicy"].update(backoffLimit=2))

    big = ("--set", "cluster.pretrain.cpu='900'")
    watching = Command(root, submitter, tmp_path / "big.log", "-m", "training", "submit", "pretrain", *big)
    wait_for(lambda: "has enough" in watching.log)
    assert "no node of the pool gke-nodepool=cpu has enough cpu (asks for 900) free" in watching.log
    assert "1 × (1 processes, 900 cpu, 1Gi) on pool cpu, no queue" in watching.log
    watching.process.send_signal(signal.SIGINT)
    job = only_job(prepared, seed)
    assert f"bit attach {job}" in watching.end(130)
    assert job in bit(root, submitter, "jobs")
    other = Command(root, submitter, tmp_path / "other.log", "-m", "training", "attach", job)
    wait_for(lambda: "has enough" in other.log)
    bit(root, submitter, "cancel", job)
    assert f"{job} was removed: somebody cancelled it" in other.end(2)

    wrong = (f"pretrain.seed={other_seed}", "pretrain.mixup_alpha=0.1", "pretrain.global_batch=7")
    bit(root, submitter, "submit", "pretrain", "--detach", *(f"--set={value}" for value in wrong))
    failed = bit(root, submitter, "attach", only_job(prepared, other_seed), status=1)  # the exit code of its container
    assert "global_batch=7 is odd; mixup pairs neighbours" in failed
    assert "started again 1 time; last words: " in failed
    assert "Mend it, then: bit submit pretrain --retry" in failed
    assert "global_batch=7 is odd; mixup pairs neighbours" in bit(
        root, prepared, "attach", only_job(prepared, other_seed), status=1
    )  # no pods now

    late = project(template, tmp_path / "late", tmp_path / "store", seed=late_seed, pretrain={"steps": 100_000})
    edit(late, lambda job: job["spec"]["runPolicy"].update(activeDeadlineSeconds=5))
    watching = Command(late, submitter, tmp_path / "late.log", "-m", "training", "submit", "pretrain")
    wait_for(lambda: "running" in watching.log)
    time.sleep(5)  # then any change makes the operator look at the job again, which it does not by itself
    prepared.kubectl("annotate", "pytorchjob", only_job(prepared, late_seed), "-n", "bit", "looked-at=once")
    assert "its deadline passed (runPolicy.activeDeadlineSeconds)" in watching.end(1)


def test_two_people_get_one_job_and_outlive_the_api_server(
    prepared: Cluster, submitter: Cluster, kubelet: Kubelet, template: Path, tmp_path: Path
) -> None:
    seed = drawn()
    root = project(template, tmp_path / "p", tmp_path / "store", seed=seed, pretrain=LONG | {"steps": 500})
    other = project(template, tmp_path / "q", tmp_path / "store", seed=seed, pretrain=LONG | {"steps": 500})
    submit = ("-m", "training", "submit", "pretrain")
    both = [Command(each, submitter, tmp_path / f"{each.name}.log", *submit) for each in (root, other)]
    wait_for(lambda: all("running" in each.log for each in both))
    job = only_job(prepared, seed)
    with prepared.api_server_down(signal.SIGSTOP):
        time.sleep(7)  # longer than a connection attempt of the watch
    with prepared.api_server_down(signal.SIGKILL):
        wait_for(lambda: all("does not answer" in each.log for each in both))
    for each in both:
        assert "the job goes on" in each.end()
    assert only_job(prepared, seed) == job
    uid = prepared.get("pytorchjob", job, "-n", "bit")["metadata"]["uid"]
    made = receipt(root, "pretrain")
    assert made["details"]["job_uid"] == receipt(other, "pretrain")["details"]["job_uid"] == uid

    bit(root, submitter, "cancel", job)
    assert "its receipt is back" in bit(root, submitter, "submit", "pretrain")
    assert not prepared.get("pytorchjobs", "-n", "bit", "-l", f"bit/job={job}")["items"]
    assert receipt(root, "pretrain")["outputs"] == made["outputs"]


def test_a_job_is_suspended_and_goes_on_as_kueue_does_it(
    prepared: Cluster, submitter: Cluster, kubelet: Kubelet, template: Path, tmp_path: Path
) -> None:
    seed = drawn()
    never = {**LONG, "checkpoint_every": 300}  # the only checkpoint is the one that SIGTERM asks for
    queued = {"queue": "training"}
    root = project(template, tmp_path / "p", tmp_path / "store", seed=seed, pretrain=never, cluster=queued)
    submit = Command(root, submitter, tmp_path / "submit.log", "-m", "training", "submit", "pretrain")
    wait_for(lambda: "running" in submit.log)
    job = only_job(prepared, seed)
    wait_for(lambda: "loss" in kubelet.log(f"{job}-worker-0"))

    def suspend(value: bool) -> None:
        patch = json.dumps({"spec": {"runPolicy": {"suspend": value}}})
        prepared.kubectl("patch", "pytorchjob", job, "-n", "bit", "--type=merge", "-p", patch)

    suspend(True)
    wait_for(lambda: "suspended; queue 'training' has not admitted it" in submit.log)
    tell_quota(prepared, job, "insufficient unused quota for nvidia.com/gpu in flavor gpu, 2 more needed")
    told = "in queue 'training', number 1 of 1 there, waiting for quota: insufficient unused quota for nvidia.com/gpu"
    wait_for(lambda: told in submit.log)
    wait_for(lambda: not prepared.get("pods", "-n", "bit", "-l", f"bit/job={job}")["items"])
    suspend(False)
    submit.end()
    assert "stopped by SIGTERM after step" in kubelet.log(f"{job}-worker-0")
    assert "resumed after step" in kubelet.log(f"{job}-worker-0")


def tell_quota(cluster: Cluster, job: str, message: str) -> None:
    """Kueue's own object for a job that waits for quota."""
    uid = cluster.get("pytorchjob", job, "-n", "bit")["metadata"]["uid"]
    template = {"spec": {"restartPolicy": "OnFailure", "containers": [{"name": "pytorch", "image": "bit-training"}]}}
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": {"name": job, "namespace": "bit", "labels": {"kueue.x-k8s.io/job-uid": uid}},
        "spec": {"queueName": "training", "podSets": [{"name": "worker", "count": 1, "template": template}]},
    }
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(workload))
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    row = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
    status = json.dumps({"status": {"conditions": [row | {"lastTransitionTime": since}]}})
    patch = ("--subresource=status", "--type=merge", "-p", status)
    cluster.kubectl("patch", "workloads.kueue.x-k8s.io", job, "-n", "bit", *patch)


def misspelt(job: Any) -> None:
    job["spec"]["runPolicy"]["cleanPodPolice"] = "Running"


def two_masters(job: Any) -> None:
    roles = job["spec"]["pytorchReplicaSpecs"]
    roles["Master"] = roles["Worker"] | {"replicas": 2}


def nameless(job: Any) -> None:
    del job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"]


def wrong_resource(job: Any) -> None:
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["resources"]["limits"]["gpu"] = (
        "1"
    )


def right(job: Any) -> None:
    pass


EDITS = {
    "'cleanPodPolice' is not a key here: did you mean 'cleanPodPolicy'": (misspelt, ()),
    "Master has 2 replicas; there can be only 1": (two_masters, ()),
    "no container named pytorch, only one without a name": (nameless, ()),
    "asks for resource 'gpu'": (wrong_resource, ()),
    "cannot apply PyTorchJob bit-pretrain": (
        right,
        ("--set", "cluster.pretrain.memory=1Gib"),
    ),  # the API server's own word
    "would be taken by https://127.0.0.1": (right, ()),
}


def test_a_dry_run_refuses_invalid_edits_and_makes_nothing(
    prepared: Cluster, submitter: Cluster, template: Path, tmp_path: Path
) -> None:
    seed = drawn()
    ways = {}
    for number, (said, (change, arguments)) in enumerate(EDITS.items()):
        root = project(template, tmp_path / f"p{number}", tmp_path / "store", seed=seed)
        edit(root, change, ("pretrain",))
        submit = ("-m", "training", "submit", "pretrain", "--dry-run", *arguments)
        ways[said] = Command(root, submitter, tmp_path / f"{number}.log", *submit)
    for said, way in ways.items():
        assert said in way.end(0 if "would be taken" in said else 2), said
    maps = prepared.get("configmaps", "-n", "bit")["items"]
    assert not [made for made in maps if f"seed: {seed}\n" in made.get("data", {}).get("params.yaml", "")]
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob("p*/.dvc-remote"))
