"""The chart on a real node, from the project's own image, under Pod Security restricted: an upgrade under load, a deleted pod."""

import asyncio
import json
import subprocess
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
from tests.autoscaling import chart
from tests.autoscaling.test_scaling import helm
from tests.images import build
from tests.services.exports import export, gray_png
from training.demo.walk import free_port
from training.serve import process, wait_for

pytestmark = pytest.mark.heavy
NAMESPACE, RELEASE, NAME = "shop", "shop", "shop-inference"
ASK = load.request("/v1/lamps/classify", gray_png(200))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    """A real node that has the image, a volume with one export, and the chart in a namespace under Pod Security restricted."""
    if missing := build.lacking():
        pytest.skip(f"images cannot be built here: no {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("node")
    image = build.build("inference")
    exports = folder / "exports"
    exports.mkdir(mode=0o755)
    (exports / "lamps.onnx").write_bytes(export())
    with clusters.running(folder / "cluster", "node") as running:
        archive = build.save(image, folder / "image.tar")
        running.load(archive)
        archive.unlink()
        running.kubectl("create", "namespace", NAMESPACE)
        running.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
        running.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(volume(exports)))
        repository, _, tag = image.rpartition(":")
        values = {
            "image": {"repository": repository, "tag": tag},
            "models": {"path": "/models", "existingClaim": "exports"},
            "tenants": ["lamps"],
            "replicas": 2,
            "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
            "shutdown": {"preStopSeconds": 3, "drainSeconds": 2},
            "settings": {"memory_mb": 256},
        }
        (folder / "values.yaml").write_text(yaml.safe_dump(values))
        where = ("--namespace", NAMESPACE, "--values", str(folder / "values.yaml"), "--wait", "--timeout", "120s")
        try:
            helm(running, "install", RELEASE, str(chart.CHART), *where)
        except AssertionError as error:
            raise AssertionError(told(running)) from error
        yield running


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

    def __init__(self, url: str, customers: int = 4) -> None:
        self.url, self.customers = url, customers
        self.answers: list[int | str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    async def _all(self) -> None:
        await asyncio.gather(*(self._one() for _ in range(self.customers)))

    async def _one(self) -> None:
        while not self._stop.is_set():
            try:
                connection = await load.connect(self.url)
                self.answers.append((await connection.ask(ASK))[0])
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


def test_it_answers_a_classify_request_through_its_service(cluster: clusters.Cluster) -> None:
    answer = httpx.post(f"{address(cluster)}/v1/lamps/classify", content=gray_png(200), timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"][0]["class"] == "bright"
    assert (
        cluster.get("namespace", NAMESPACE)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )


def test_the_curl_of_the_notes_works(cluster: clusters.Cluster, tmp_path: Path) -> None:
    notes = helm(cluster, "get", "notes", RELEASE, "--namespace", NAMESPACE)
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
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(said)["predictions"][0]["class"] == "bright"


def test_helm_test_passes(cluster: clusters.Cluster) -> None:
    said = helm(cluster, "test", RELEASE, "--namespace", NAMESPACE, "--timeout", "120s")
    assert "Phase:          Succeeded" in said


def test_an_upgrade_under_load_loses_no_request(cluster: clusters.Cluster) -> None:
    before = pods(cluster)
    assert len(before) == 2
    more = ("--reuse-values", "--set", "podLabels.round=second", "--wait", "--timeout", "120s")
    with Asking(address(cluster)) as asking:
        helm(cluster, "upgrade", RELEASE, str(chart.CHART), "--namespace", NAMESPACE, *more)
        clusters.wait_for(lambda: len(pods(cluster)) == 2 and not pods(cluster) & before, 60)
        clusters.wait_for(lambda: not left(cluster, before), 60)
    assert len(asking.answers) > 100
    assert set(asking.answers) == {200}


def test_a_deleted_pod_loses_no_request_and_is_replaced(cluster: clusters.Cluster) -> None:
    before = pods(cluster)
    victim = min(before)
    with Asking(address(cluster)) as asking:
        cluster.kubectl("delete", "pod", victim, "--namespace", NAMESPACE)  # returns when it has ended
        clusters.wait_for(lambda: len(pods(cluster)) == 2 and victim not in pods(cluster), 60)
    assert len(asking.answers) > 100
    assert set(asking.answers) == {200}


def left(cluster: clusters.Cluster, names: set[str]) -> set[str]:
    """Those of the pods that still are there, ending or not."""
    found = cluster.get("pods", "--namespace", NAMESPACE)
    return {pod["metadata"]["name"] for pod in found["items"]} & names
