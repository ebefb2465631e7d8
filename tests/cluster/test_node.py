"""Once for real: the training image in real pods on a real node, under Pod Security restricted; a pod is deleted on the way."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import clusters
from tests.cluster.conftest import K8S
from tests.cluster.projects import Command, bit, drawn, edit, fresh, project, receipt
from tests.clusters import Cluster, wait_for
from tests.images import build
from training import tracking
from training.demo.walk import free_port

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(build.lacking()) and "CI" not in os.environ, reason=f"needs {', '.join(build.lacking())}"),
]
NODE = {"kubernetes.io/hostname": "node-0"}
PODS = {"pool": "cpu", "node_selector": NODE, "cpu": "1", "memory": "2Gi", "workers": 2}
STEPS = {"steps": 200, "checkpoint_every": 10, "evaluate_every": 200}


@pytest.fixture(scope="module")
def image() -> str:
    return build.build("training-cpu")


@pytest.fixture(scope="module")
def node(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with one real node that has the training image."""
    folder = tmp_path_factory.mktemp("node")
    archive = build.save(image, folder / "image.tar")
    with clusters.running(folder / "cluster", "training-operator,node") as cluster:
        cluster.load(archive)
        archive.unlink()
        yield cluster


@pytest.fixture(scope="module")
def shared(node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kubectl apply -k k8s/overlays/kind`, its claim bound to this folder, which the node has as well."""
    node.kubectl("apply", "--server-side", "-k", str(K8S / "overlays" / "kind"))
    folder = tmp_path_factory.mktemp("shared")
    folder.chmod(0o777)  # hostPath volumes are not handed to the pods' group
    for above in folder.parents[:2]:
        above.chmod(above.stat().st_mode | 0o011)  # pytest's folders are its user's alone
    spec = {
        "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "5Gi"},
        "hostPath": {"path": str(folder)},
        "claimRef": {"namespace": "bit", "name": "bit-checkpoints"},
    }
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "shared"}, "spec": spec}
    node.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(volume))
    return folder


def uid_of(node: Cluster, pod: str) -> str | None:
    found = node.get("pods", "-n", "bit", "--field-selector", f"metadata.name={pod}")["items"]
    return found[0]["metadata"]["uid"] if found else None


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, str]]:
    """An MLflow server; yields its address here and for pods."""
    folder.mkdir()
    port = free_port()
    listen = ("--host", "0.0.0.0", "--port", str(port), "--workers", "1")  # noqa: S104
    store = (
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    )
    allowed = os.environ | {"MLFLOW_SERVER_ALLOWED_HOSTS": "*"}
    log = folder / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "mlflow", "server", *listen, *store]
        server = subprocess.Popen(command, env=allowed, cwd=folder, stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: answers(port) or server.poll() is not None)
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", f"http://host.test:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # with the processes that it started
        server.wait()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh(tmp_path_factory.mktemp("template") / "project")


def mount(shared: Path, job: Any) -> None:
    """Store and remote have the same path in the pods and here."""
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    [container] = pod["containers"]
    container["volumeMounts"].append({"name": "checkpoints", "mountPath": str(shared)})


def test_two_real_workers_train_through_the_loss_of_a_pod(
    node: Cluster, shared: Path, image: str, template: Path, tmp_path: Path
) -> None:
    with mlflow_server(tmp_path / "mlflow") as (here, there):
        cluster = {"image": image, "tracking_uri": there, "remote": str(shared / "dvc"), "pretrain": PODS}
        root = project(
            template, tmp_path / "p", shared / "store", seed=drawn(), pretrain=STEPS, cluster=cluster, tracking_uri=here
        )
        edit(root, partial(mount, shared))
        submit = Command(root, node, tmp_path / "submit.log", "-m", "training", "submit", "pretrain")
        wait_for(lambda: list(shared.rglob("step-*/meta.json")) or submit.process.poll() is not None)
        assert submit.process.poll() is None, submit.log
        [job] = node.get("pytorchjobs", "-n", "bit")["items"]
        name = job["metadata"]["name"]
        wait_for(lambda: "upstream 50/200" in bit(root, node, "logs", name))
        lost = f"{name}-worker-0"  # the hardest to lose: the others meet at it
        before = node.get("pod", lost, "-n", "bit")
        assert before["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
        node.kubectl("delete", "pod", lost, "-n", "bit", "--wait=false")
        wait_for(lambda: uid_of(node, lost) not in (None, before["metadata"]["uid"]))
        said = submit.end()
        assert "upstream 200/200" in said  # rank 0's own lines
        made = receipt(root, "pretrain")
        assert made["details"]["job_uid"] == job["metadata"]["uid"]
        assert (shared / "store" / name / "weights.npz").stat().st_size == made["outputs"]["weights"]["size_bytes"]
        assert "resumed after step" in said
        run = tracking.connect(here).get_run(made["run_id"])
        assert run.info.status == "FINISHED"
        assert run.data.tags["k8s.job"] == name
        assert run.data.tags["k8s.job_uid"] == job["metadata"]["uid"]
        assert run.data.tags["k8s.node"] == "node-0"
        assert run.data.tags["dvc.md5"].endswith(".dir")


def test_a_container_that_is_killed_for_memory_is_told_with_what_would_fit(
    node: Cluster, shared: Path, image: str, template: Path, tmp_path: Path
) -> None:
    small = PODS | {"workers": 1, "memory": "150Mi"}  # less than torch alone
    cluster = {"image": image, "remote": str(shared / "dvc"), "pretrain": small}
    root = project(template, tmp_path / "p", shared / "store", seed=drawn(), cluster=cluster)
    edit(root, partial(mount, shared))
    edit(root, lambda job: job["spec"]["runPolicy"].update(backoffLimit=1))
    said = bit(root, node, "submit", "pretrain", status=137)
    assert "killed for memory (OOMKilled): --set pretrain.micro_batch=4 halves what a forward pass keeps" in said
    assert "or raise cluster.pretrain.memory" in said
