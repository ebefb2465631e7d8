"""`runner: kubernetes` end to end: dvc repro, jobs through the real API server and operator, pods' commands as real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import K8S
from tests.cluster.kubelet import Kubelet
from tests.clusters import Cluster, wait_for
from tests.conftest import draw_folder
from tests.e2e.test_pipeline import COPIED, PARAMS

ROOT = Path(__file__).parents[2]
HOLD = {"pod-complete.stage.kwok.x-k8s.io/delay": "1h"}  # the test's kubelet says when a pod ends


def project(root: Path, runner: str, store: Path, **cluster: object) -> Path:
    """A fresh repository with one tenant whose pretrain and finetune run on the cluster, or here."""
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "pictures*", "dvc.lock", "*.partial", "textures")
        shutil.copytree(source, root / name, ignore=ignore) if source.is_dir() else shutil.copy(source, root / name)
    shutil.copytree(K8S, root / "k8s")
    for path in (root / "k8s").glob("*.yaml"):
        objects = list(yaml.safe_load_all(path.read_text()))
        for made in objects:
            if made["kind"] == "PyTorchJob":
                made["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"]["annotations"] = HOLD
        path.write_text(yaml.safe_dump_all(objects))
    given = {
        "runner": runner,
        "tracking_uri": f"sqlite:///{root}/.mlflow/mlflow.db",
        "cluster": {
            "namespace": "bit",
            "image": "bit-training@sha256:" + "0" * 64,
            "store": f"file://{store}",
            "remote": str(root / ".dvc-remote"),
            "queue": None,
            "pool": "cpu",
            "node_selector": {"cloud.google.com/gke-nodepool": "cpu"},
            "workers": 2,
            "cpu": "1",
            "memory": "1Gi",
            **cluster,
        },
    }
    own = {"pretrain": PARAMS["pretrain"] | {"seed": abs(hash(str(root))) % 1000 if cluster else 0}}
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS | own | given))
    draw_folder(root / "data" / "upstream", classes=4)
    draw_folder(root / "tenants" / "digits" / "pictures", classes=2, train=6, test=4)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "add", "-q", "data/upstream", "tenants/digits/pictures")
    return root


def environment(root: Path, cluster: Cluster | None = None) -> dict[str, str]:
    return (cluster.environment if cluster else dict(os.environ)) | {
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def dvc(root: Path, *arguments: str, cluster: Cluster | None = None) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(
        command, cwd=root, env=environment(root, cluster), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def bit(root: Path, cluster: Cluster, *arguments: str, status: int = 0) -> str:
    command = [sys.executable, "-m", "training", *arguments]
    done = subprocess.run(
        command, cwd=root, env=environment(root, cluster), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def kubelet(prepared: Cluster, tmp_path: Path) -> Iterator[Kubelet]:
    prepared.kubectl("delete", "pytorchjobs", "--all", "-n", "bit")
    prepared.kubectl("delete", "pods", "--all", "-n", "bit", "--force", "--grace-period=0")
    running = Kubelet(prepared, tmp_path / "pods", ROOT)
    running.start()
    yield running
    running.stop()


def receipt(root: Path, stage: str) -> dict:
    return json.loads((root / "runs" / stage / "receipt.json").read_text())


@pytest.mark.heavy
def test_dvc_repro_on_the_cluster_gives_what_it_gives_here(prepared: Cluster, kubelet: Kubelet, tmp_path: Path) -> None:
    there = project(tmp_path / "there", "kubernetes", tmp_path / "store")
    here = project(tmp_path / "here", "local", tmp_path / "store")
    dvc(there, "repro", "tenants/digits/dvc.yaml", cluster=prepared)
    dvc(here, "repro", "tenants/digits/dvc.yaml")
    for stage in ("pretrain", "finetune/digits", "evaluate/digits"):
        ours, theirs = receipt(here, stage), receipt(there, stage)
        assert set(theirs) == set(ours)
        for name, value in ours["metrics"].items():
            if not name.endswith("seconds"):
                assert theirs["metrics"][name] == pytest.approx(value, abs=2e-2), name
    assert receipt(there, "pretrain")["details"]["job"].startswith("bit-pretrain-")
    assert receipt(there, "pretrain")["outputs"]["weights"]["uri"].startswith("file://")
    said = dvc(there, "repro", "tenants/digits/dvc.yaml", cluster=prepared)
    assert "Running stage" not in said
    again = bit(there, prepared, "submit", "pretrain")
    assert "succeeded already; joined" in again


@pytest.mark.heavy
def test_a_killed_repro_attaches_and_a_killed_worker_resumes(
    prepared: Cluster, kubelet: Kubelet, tmp_path: Path
) -> None:
    root = project(tmp_path / "p", "kubernetes", tmp_path / "store")
    text = (
        (root / "params.yaml")
        .read_text()
        .replace("steps: 6", "steps: 400")
        .replace("checkpoint_every: 4", "checkpoint_every: 20")
    )
    (root / "params.yaml").write_text(text)
    command = [sys.executable, "-m", "dvc", "repro", "pretrain"]
    first = subprocess.Popen(command, cwd=root, env=environment(root, prepared), start_new_session=True)
    checkpoints = tmp_path / "pods"
    wait_for(lambda: bool(list(checkpoints.glob("*/checkpoints/**/step-*"))), 120)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    [job] = prepared.get("pytorchjobs", "-n", "bit")["items"]
    victim = kubelet.process_of(f"{job['metadata']['name']}-worker-1")
    assert victim is not None
    os.killpg(victim.pid, signal.SIGKILL)
    said = dvc(root, "repro", "pretrain", cluster=prepared)
    assert "joined" in said
    assert "succeeded" in said
    assert "resumed after step" in kubelet.log(job["metadata"]["name"])
    assert len(prepared.get("pytorchjobs", "-n", "bit")["items"]) == 1


@pytest.mark.heavy
def test_why_a_job_waits_and_fails_is_told_in_plain_words(prepared: Cluster, kubelet: Kubelet, tmp_path: Path) -> None:
    root = project(tmp_path / "p", "kubernetes", tmp_path / "store")
    bit(root, prepared, "pack")
    bit(root, prepared, "submit", "pretrain", "--dry-run", "--set", "pretrain.seed=3")
    assert prepared.get("pytorchjobs", "-n", "bit")["items"] == []

    big = bit(
        root, prepared, "submit", "pretrain", "--detach", "--set", "pretrain.seed=4", "--set", "cluster.cpu='900'"
    )
    name = next(word.strip(":") for word in big.split() if word.startswith("bit-pretrain"))
    watching = subprocess.Popen(
        [sys.executable, "-m", "training", "attach", name],
        cwd=root, env=environment(root, prepared), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stderr is not None
    said = ""
    end = time.monotonic() + 60
    while "has enough cpu" not in said and time.monotonic() < end:
        said += watching.stderr.readline()
    assert "no node of the pool gke-nodepool=cpu has enough cpu (asks for 900)" in said
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130
    assert f"bit attach {name}" in watching.stderr.read()
    assert name in bit(root, prepared, "jobs")
    bit(root, prepared, "cancel", name)

    wrong = ("--set", "pretrain.seed=5", "--set", "pretrain.resize=20", "--set", "pretrain.crop=32")
    failed = bit(root, prepared, "submit", "pretrain", *wrong, "--set", "cluster.workers=1", status=2)
    assert "crop=32 is larger than resize=20" in failed
    assert "--retry" in failed


@pytest.mark.heavy
def test_the_watch_outlives_the_api_server(prepared: Cluster, kubelet: Kubelet, tmp_path: Path) -> None:
    root = project(tmp_path / "p", "kubernetes", tmp_path / "store")
    bit(root, prepared, "pack")
    command = [sys.executable, "-m", "training", "submit", "pretrain", "--set", "pretrain.seed=6"]
    watching = subprocess.Popen(command, cwd=root, env=environment(root, prepared), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: bool(prepared.get("pytorchjobs", "-n", "bit")["items"]), 60)
    processes = json.loads((prepared.state / "processes.json").read_text())
    [server] = [one["pid"] for one in processes if "apiserver" in json.dumps(one)][:1]
    os.kill(server, signal.SIGSTOP)
    time.sleep(8)
    os.kill(server, signal.SIGCONT)
    assert watching.wait(180) == 0
    assert (root / "runs" / "pretrain" / "receipt.json").is_file()


@pytest.mark.heavy
def test_two_people_at_once_get_one_job_and_a_job_that_is_gone_is_not_run_again(
    prepared: Cluster, kubelet: Kubelet, tmp_path: Path
) -> None:
    root = project(tmp_path / "p", "kubernetes", tmp_path / "store", workers=1)
    bit(root, prepared, "pack")
    command = [sys.executable, "-m", "training", "submit", "pretrain"]
    both = [subprocess.Popen(command, cwd=root, env=environment(root, prepared)) for _ in range(2)]
    assert [one.wait(180) for one in both] == [0, 0]
    [job] = prepared.get("pytorchjobs", "-n", "bit")["items"]
    made = receipt(root, "pretrain")
    assert made["details"]["job_uid"] == job["metadata"]["uid"]
    bit(root, prepared, "cancel", job["metadata"]["name"])
    assert "its receipt is back" in bit(root, prepared, "submit", "pretrain")
    assert prepared.get("pytorchjobs", "-n", "bit")["items"] == []
    assert receipt(root, "pretrain")["outputs"] == made["outputs"]
