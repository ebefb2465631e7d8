"""The chart on a real node, from the project's own image, under Pod Security restricted: an upgrade under load, a deleted pod."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
import yaml

from benchmarks import load
from tests import clusters
from tests.images import build
from tests.operations import runbook
from tests.services.exports import export, gray_png
from training.demo.walk import free_port
from training.serve import process, wait_for

pytestmark = pytest.mark.heavy
NAMESPACE, RELEASE, NAME = "bit", "inference", "inference"  # as the runbook calls them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runbook's commands are typed: the chart, the values, the file of keys."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "charts").symlink_to(runbook.ROOT / "charts")
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[clusters.Cluster]:
    """A real node that has the image, a volume with one export, and the chart as the runbook installs it."""
    if (missing := build.lacking()) and "CI" not in os.environ:
        pytest.skip(f"images cannot be built here: no {', '.join(missing)}")
    image = build.build("inference")
    exports = folder / "exports"
    exports.mkdir(mode=0o755)
    (exports / "lamps.onnx").write_bytes(export())
    with clusters.running(folder / "cluster", "node") as running:
        archive = build.save(image, folder / "image.tar")
        running.load(archive)
        archive.unlink()
        runbook.run("kubectl create namespace bit", running, folder)
        running.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(volume(exports)))
        new_key(running, folder)
        repository, _, tag = image.rpartition(":")
        values = {
            "image": {"repository": repository, "tag": tag},
            "models": {"path": "/models", "existingClaim": "exports"},
            "tenants": ["lamps"],
            "keys": {"existingSecret": "inference-tenants"},
            "replicas": 2,
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
            "shutdown": {"preStopSeconds": 3, "drainSeconds": 2},
            "settings": {"memory_mb": 256},
        }
        (folder / "my-values.yaml").write_text(yaml.safe_dump(values))
        try:
            runbook.run("helm install inference", running, folder)
        except AssertionError as error:
            raise AssertionError(told(running)) from error
        yield running


def new_key(cluster: clusters.Cluster, folder: Path) -> None:
    """A key more for the tenant, kept in folder/key, and the Secret with all of them."""
    program = Path(sys.executable).with_name("bit-serve-key")
    command = [program, "lamps", "--file", "tenants.json"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    (folder / "key").write_text(said.split()[-1])
    runbook.run("kubectl --namespace bit create secret generic inference-tenants", cluster, folder)


def key(folder: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {(folder / 'key').read_text()}"}


def volume(folder: Path) -> list[dict[str, object]]:
    """A PersistentVolume over a folder of this machine, and the claim that is bound to it."""
    common = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    space = {"storage": "1Gi"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "exports"},
            "spec": {**common, "capacity": space, "hostPath": {"path": str(folder)}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "exports", "namespace": NAMESPACE},
            "spec": {**common, "volumeName": "exports", "resources": {"requests": space}},
        },
    ]


def told(cluster: clusters.Cluster) -> str:
    """What the cluster says of the pods: for the one who reads a failure."""
    shown = cluster.kubectl("describe", "pods", "--namespace", NAMESPACE)
    logs = ("logs", "--namespace", NAMESPACE, "--selector", f"app.kubernetes.io/instance={RELEASE}", "--tail", "30")
    return shown[-5000:] + cluster.kubectl(*logs, status=None)


def address(cluster: clusters.Cluster) -> str:
    spec = cluster.get("service", NAME, "--namespace", NAMESPACE)["spec"]
    return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"


class Asking:
    """Customers with a new connection for each request, while the context lasts; answers: statuses, or what went wrong."""

    def __init__(self, url: str, headers: dict[str, str], customers: int = 4) -> None:
        self.url, self.customers = url, customers
        self.ask = load.request("/v1/lamps/classify", gray_png(200), headers)
        self.answers: list[int | str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    async def _all(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(self.customers)))

    async def _one(self) -> None:
        while not self._stop.is_set():
            try:
                connection = await load.connect(self.url)
                self.answers.append((await connection.ask(self.ask))[0])
                connection.transport.close()
            except OSError as error:
                self.answers.append(repr(error))
            await asyncio.sleep(0.01)

    def __enter__(self) -> "Asking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def pods(cluster: clusters.Cluster) -> set[str]:
    found = cluster.get("pods", "--namespace", NAMESPACE, "--selector", f"app.kubernetes.io/instance={RELEASE}")
    return {
        pod["metadata"]["name"]
        for pod in found["items"]
        if "deletionTimestamp" not in pod["metadata"]
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
    }


def test_it_answers_a_classify_request_through_its_service(cluster: clusters.Cluster, folder: Path) -> None:
    answer = httpx.post(f"{address(cluster)}/v1/lamps/classify", content=gray_png(200), headers=key(folder), timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["class"] == "bright"
    assert (
        cluster.get("namespace", NAMESPACE)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )


def test_the_curl_of_the_notes_works(cluster: clusters.Cluster, folder: Path, tmp_path: Path) -> None:
    notes = cluster.helm("get", "notes", RELEASE, "--namespace", NAMESPACE)
    forward, curl = (line.strip() for line in notes.splitlines() if line.startswith("  "))
    port = free_port()  # for 8080, which may be taken on this machine
    cv2.imwrite(str(tmp_path / "picture.jpg"), np.full((20, 20, 3), 250, np.uint8))
    with process(
        "port-forward",
        ["sh", "-c", f"exec {forward.removesuffix('&').replace(' 8080:', f' {port}:')}"],
        tmp_path / "log",
        cluster.environment,
    ):
        wait_for(f"http://127.0.0.1:{port}/v2/health/live", 60, tmp_path / "log")
        command = ["sh", "-c", f"{curl.replace(':8080', f':{port}')} --silent --fail"]
        said = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=os.environ | {"KEY": key(folder)["authorization"][7:]},
        ).stdout
    assert json.loads(said)["predictions"][0]["class"] == "bright"


def test_helm_test_passes(cluster: clusters.Cluster, folder: Path) -> None:
    assert "Phase:          Succeeded" in runbook.run("helm test inference", cluster, folder)


def test_what_the_one_on_call_looks_at_first_is_there(cluster: clusters.Cluster, folder: Path) -> None:
    assert runbook.run("kubectl --namespace bit get pods", cluster, folder).count("Running") == 2
    assert "Successfully assigned" in runbook.run("kubectl --namespace bit describe pod", cluster, folder)
    assert "/v1/lamps/classify" in runbook.run("kubectl --namespace bit logs --selector", cluster, folder)


def test_an_upgrade_and_the_way_back_under_load_lose_no_request(cluster: clusters.Cluster, folder: Path) -> None:
    values = yaml.safe_load((folder / "my-values.yaml").read_text())
    (folder / "my-values.yaml").write_text(yaml.safe_dump({**values, "podLabels": {"round": "second"}}))
    for start in ("helm upgrade inference", "helm rollback inference --namespace bit"):
        before = pods(cluster)
        assert len(before) == 2
        with Asking(address(cluster), key(folder)) as asking:
            runbook.run(start, cluster, folder)
            clusters.wait_for(lambda before=before: len(pods(cluster)) == 2 and not left(cluster, before), 60)
        assert len(asking.answers) > 100
        assert set(asking.answers) == {200}, start


def test_a_deleted_pod_loses_no_request_and_is_replaced(cluster: clusters.Cluster, folder: Path) -> None:
    before = pods(cluster)
    victim = min(before)
    with Asking(address(cluster), key(folder)) as asking:
        cluster.kubectl("delete", "pod", victim, "--namespace", NAMESPACE)  # returns when it has ended
        clusters.wait_for(lambda: len(pods(cluster)) == 2 and victim not in pods(cluster), 60)
    assert len(asking.answers) > 100
    assert set(asking.answers) == {200}


def test_a_new_key_opens_without_a_restart_and_the_old_one_goes_on(cluster: clusters.Cluster, folder: Path) -> None:
    def status(headers: dict[str, str]) -> int:
        url = f"{address(cluster)}/v1/lamps/classify"
        return httpx.post(url, content=gray_png(200), headers=headers, timeout=30).status_code

    old, before = key(folder), pods(cluster)
    (folder / "tenants.json").unlink()  # the runbook begins with the Secret's
    runbook.run("kubectl --namespace bit get secret inference-tenants", cluster, folder)
    new_key(cluster, folder)
    clusters.wait_for(
        lambda: {status(key(folder)) for _ in range(8)} == {200}, 180, every_s=2
    )  # the kubelet takes its time
    assert status(old) == 200
    assert status({}) == 401
    assert pods(cluster) == before


def left(cluster: clusters.Cluster, names: set[str]) -> set[str]:
    """Those of the pods that still are there, ending or not."""
    found = cluster.get("pods", "--namespace", NAMESPACE)
    return {pod["metadata"]["name"] for pod in found["items"]} & names
