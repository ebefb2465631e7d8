"""Two hundred tenants' fine-tunings at once, admitted in waves as a queue does it: one table, few requests, all receipts back."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.projects import Command, edit, fresh, project, receipt
from tests.clusters import Cluster, wait_for
from training import cli
from training.cluster.jobs import ClusterError, Jobs
from training.errors import UserError
from training.params import load
from training.submit import fleet

TENANTS = [f"tenant-{number:03d}" for number in range(200)]
QUOTA = 80
COMPLETES = {"pod-complete.stage.kwok.x-k8s.io/delay": "1s"}  # nobody plays the kubelet here


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with 200 tenants."""
    return with_tenants(tmp_path, TENANTS)


def with_tenants(tmp_path: Path, tenants: list[str]) -> Path:
    """A project with these tenants, all packed; its jobs come suspended, as Kueue's webhook makes them."""
    small = {"pool": "cpu", "node_selector": {"cloud.google.com/gke-nodepool": "cpu"}, "cpu": "50m", "memory": "64Mi"}
    cluster = {"finetune": small, "queue": "training"}
    root = project(
        fresh(tmp_path / "template", pack=False), tmp_path / "p", tmp_path / "store", seed=0, cluster=cluster
    )

    def queued(job: dict[str, Any]) -> None:
        job["spec"]["runPolicy"]["suspend"] = True
        job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"]["annotations"] = COMPLETES

    edit(root, queued, ("finetune",))
    shutil.rmtree(root / "tenants" / "digits")
    data = {"uri": "file:///packed.dir", "sha256": "0", "size_bytes": 0}
    made = {
        "config_hash": "",
        "inputs": {"dvc.md5": "0.dir"},
        "run_id": "",
        "details": {"arch": "R14x0.5", "version": "1"},
    }
    for tenant in tenants:
        packed = {"stage": "pack", "tenant": tenant, "outputs": {"dataset": data | {"sha256": tenant}}, **made}
        write(root / "tenants" / tenant / "params.yaml", yaml.safe_dump({"tenant": tenant}))
        write(root / "runs" / "pack" / tenant / "receipt.json", json.dumps(packed))
    upstream = {"stage": "pretrain", "tenant": None, "outputs": {"weights": data}, **made}
    write(root / "runs" / "pretrain" / "receipt.json", json.dumps(upstream))
    return root


@pytest.mark.heavy
def test_two_hundred_tenants_cost_fewer_than_ten_requests_each(prepared: Cluster, root: Path, tmp_path: Path) -> None:
    submit = Command(root, prepared, tmp_path / "submit.log", "-m", "training", "submit", "finetune", "--all")
    admitted: set[str] = set()

    def play_the_queue() -> bool:
        """Admits jobs while there is quota, and leaves what their pods would leave in the store."""
        jobs = prepared.get("pytorchjobs", "-n", "bit", "-l", "bit/stage=finetune")["items"]
        over = {job["metadata"]["name"] for job in jobs if told(job, "Succeeded")}
        patches = []
        for job in sorted(jobs, key=lambda job: job["metadata"]["name"]):
            name, tenant = job["metadata"]["name"], job["metadata"]["labels"]["bit/tenant"]
            assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
            if name not in admitted and len(admitted - over) < QUOTA:
                admitted.add(name)
                result = {"config_hash": "", "inputs": {}, "run_id": "", "stage": "finetune", "tenant": tenant}
                write(tmp_path / "store" / name / "receipt.json", json.dumps(result))
                patches.append(f"pytorchjob/{name}")
        if patches:
            resume = json.dumps({"spec": {"runPolicy": {"suspend": False}}})
            prepared.kubectl("patch", "-n", "bit", "--type=merge", "-p", resume, *patches)
        return submit.process.poll() is not None

    wait_for(play_the_queue, 900, every_s=1)
    said = submit.end()
    assert len(admitted) == len(TENANTS)
    assert "suspended" in said
    assert said.count("│ tenant-") == len(TENANTS)
    assert f"finetune, {len(TENANTS)} tenants: {len(TENANTS)} succeeded" in said
    assert receipt(root, "finetune/tenant-199")["tenant"] == "tenant-199"
    [requests] = [int(line.split()[0]) for line in said.splitlines() if "requests to the API server" in line]
    assert requests < 10 * len(TENANTS)

    prepared.kubectl("delete", "pytorchjobs", "-n", "bit", "-l", "bit/stage=finetune")
    again = Command(root, prepared, tmp_path / "again.log", "-m", "training", "submit", "finetune", "--all")
    assert again.end().count("Succeeded") == len(TENANTS)  # by the receipts that lie in the store
    assert not prepared.get("pytorchjobs", "-n", "bit", "-l", "bit/stage=finetune")["items"]


def test_all_tenants_are_tried_submitted_and_left_and_what_has_ended_is_not_run_again(
    prepared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["fleet-a", "fleet-b"]
    monkeypatch.chdir(with_tenants(tmp_path, two))
    monkeypatch.setenv("KUBECONFIG", str(prepared.kubeconfig))

    def submit(*arguments: str) -> str:
        cli.build()(["submit", "finetune", "--all", *arguments], standalone_mode=False)
        said = capsys.readouterr()
        return said.out + said.err

    def jobs() -> list[str]:
        found = prepared.get("pytorchjobs", "-n", "bit", "-l", "bit/stage=finetune")["items"]
        return sorted(job["metadata"]["name"] for job in found)

    said = submit("--dry-run")
    assert said.count("would be taken by") == len(two)
    assert [made["kind"] for made in yaml.safe_load_all(said.partition("bit-finetune-fleet-a")[0])] == ["ConfigMap"]
    assert jobs() == []
    with pytest.raises(UserError, match="takes a tenant or --all"):
        submit("fleet-a")
    assert "2 jobs are there, 0 ended before" in submit("--detach")
    names = jobs()
    assert len(names) == len(two)
    with pytest.raises(ClusterError, match=f"`bit cancel {names[0]}`"):
        submit("--set", "finetune.micro_batch=2")
    for name, tenant in zip(names, two, strict=True):
        ended = {"stage": "finetune", "tenant": tenant, "config_hash": "", "inputs": {}, "run_id": ""}
        write(tmp_path / "store" / name / "receipt.json", json.dumps(ended))
        Jobs(load().cluster).delete(name)
    submit()
    assert jobs() == []
    assert receipt(Path(), "finetune/fleet-b")["details"]["job"] == names[1]


def test_why_tenants_wait_and_fail_is_told_for_all_of_them(
    prepared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tenants = ["why-a", "why-b", "why-c"]
    monkeypatch.chdir(with_tenants(tmp_path, tenants))
    monkeypatch.setenv("KUBECONFIG", str(prepared.kubeconfig))
    said, failures = "", []

    def follow() -> None:
        try:
            big = ["cluster.finetune.cpu='900'"]
            fleet({tenant: load(tenant=tenant, overrides=big) for tenant in tenants}, look_s=1)
        except ClusterError as error:
            failures.append(str(error))

    def says(*texts: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return all(text in said for text in texts)

    def status(kind: str, name: str, value: dict[str, Any]) -> None:
        patch = json.dumps({"status": value})
        prepared.kubectl("patch", kind, name, "-n", "bit", "--subresource=status", "--type=merge", "-p", patch)

    def killed(times: int) -> None:
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        told = {
            "name": "pytorch",
            "image": "x",
            "imageID": "",
            "ready": True,
            "restartCount": times,
            "lastState": ended,
        }
        running = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        status("pod", f"{a}-worker-0", {"phase": "Running", "containerStatuses": [told | {"state": running}]})

    follower = threading.Thread(target=follow)
    follower.start()
    wait_for(lambda: says("suspended; queue 'training' has not admitted it; 2 more like it"))
    a, b, c = sorted(
        job["metadata"]["name"]
        for job in prepared.get("pytorchjobs", "-n", "bit", "-l", "bit/stage=finetune")["items"]
        if job["metadata"]["labels"]["bit/tenant"].startswith("why-")
    )
    resume = json.dumps({"spec": {"runPolicy": {"suspend": False}}})
    prepared.kubectl("patch", "-n", "bit", "--type=merge", "-p", resume, f"pytorchjob/{a}", f"pytorchjob/{b}")
    wait_for(
        lambda: says(
            f"{a}: no node of the pool gke-nodepool=cpu has enough cpu (asks for 900) free", "; 1 more like it"
        )
    )
    killed(1)
    wait_for(lambda: says(f"{a}: started again 1 time; killed for memory (OOMKilled)"))
    killed(100)  # more than backoffLimit: the operator gives up, and takes the pod away
    prepared.kubectl("delete", "pytorchjobs", "-n", "bit", b, c)
    follower.join(60)
    assert says("finetune, 3 tenants: 1 failed, 2 removed")
    [told] = failures
    assert "why-a: killed for memory (OOMKilled)" in told
    assert "why-b: somebody cancelled it" in told


def test_retry_runs_again_what_failed_or_lost_its_receipt_and_nothing_else(
    prepared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(with_tenants(tmp_path, ["retry-a"]))
    monkeypatch.setenv("KUBECONFIG", str(prepared.kubeconfig))

    def job() -> dict[str, Any]:
        selector = ("-n", "bit", "-l", "bit/tenant=retry-a")
        [found] = prepared.get("pytorchjobs", *selector)["items"]
        return found

    def submit(*arguments: str) -> str:
        cli.build()(["submit", "finetune", "retry-a", "--detach", *arguments], standalone_mode=False)
        return job()["metadata"]["uid"]

    def end(condition: str) -> None:
        since = "2026-01-01T00:00:00Z"
        row = {"type": condition, "status": "True", "reason": condition, "message": "", "lastUpdateTime": since}
        patch = json.dumps({"status": {"conditions": [row | {"lastTransitionTime": since}]}})

        def ended() -> bool:
            prepared.kubectl(
                "patch", "pytorchjob", name, "-n", "bit", "--subresource=status", "--type=merge", "-p", patch
            )
            return told(job(), condition)

        wait_for(ended)

    first = submit()
    name = job()["metadata"]["name"]
    left = tmp_path / "store" / name / "receipt.json"
    good = json.dumps({"config_hash": "", "inputs": {}, "run_id": "", "stage": "finetune", "tenant": "retry-a"})
    assert submit("--retry") == first  # it runs
    write(left, good)
    end("Succeeded")
    assert submit("--retry") == first
    left.unlink()
    left.mkdir()  # a store that answers with an error: whether the receipt is lost cannot be told
    with pytest.raises(ClusterError, match="cannot be read now"):
        submit("--retry")
    assert job()["metadata"]["uid"] == first
    left.rmdir()
    second = submit("--retry")  # it is lost
    assert second != first
    write(left, good[:-5])
    end("Succeeded")
    third = submit("--retry")  # it is damaged
    assert third not in (first, second)
    assert not left.exists()
    write(left.with_name("error.txt"), "the program's own words")
    end("Failed")
    with pytest.raises(ClusterError, match="the program's own words"):
        submit()
    assert submit("--retry") not in (first, second, third)
    assert not left.with_name("error.txt").exists()


def test_a_tenant_that_cannot_be_submitted_leaves_the_others_theirs(
    prepared: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = with_tenants(tmp_path, ["left-a", "left-b"])
    monkeypatch.chdir(root)
    monkeypatch.setenv("KUBECONFIG", str(prepared.kubeconfig))
    (root / "runs" / "pack" / "left-a" / "receipt.json").unlink()
    with pytest.raises(ClusterError, match=r"1 of 2 failed.*\nleft-a: .*run the stage 'pack' first"):
        cli.build()(["submit", "finetune", "--all", "--detach"], standalone_mode=False)
    [job] = prepared.get("pytorchjobs", "-n", "bit", "-l", "bit/tenant in (left-a,left-b)")["items"]
    assert job["metadata"]["labels"]["bit/tenant"] == "left-b"
    prepared.kubectl("delete", "pytorchjob", "-n", "bit", job["metadata"]["name"])


def told(job: dict[str, Any], condition: str) -> bool:
    rows = job.get("status", {}).get("conditions", [])
    return any(row["type"] == condition and row["status"] == "True" for row in rows)
