"""The runbook's commands that need no running pod, against a real API server and KEDA's types."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.operations import runbook

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    with clusters.running(tmp_path_factory.mktemp("plane"), "keda") as cluster:
        yield cluster


def test_mlflow_is_stopped_and_started_for_a_restore(cluster: clusters.Cluster) -> None:
    cluster.kubectl("create", "namespace", "mlflow")
    cluster.helm("install", "mlflow", str(runbook.ROOT / "charts/mlflow"), "--namespace", "mlflow")

    def replicas() -> int:
        return int(cluster.get("deployment", "mlflow", "--namespace", "mlflow")["spec"]["replicas"])

    assert replicas() == 1
    runbook.run("kubectl --namespace mlflow scale deployment/mlflow --replicas=0", cluster, Path.cwd())
    assert replicas() == 0
    assert "cronjob.batch/mlflow-backup" in runbook.run(
        "kubectl --namespace mlflow get cronjobs,jobs", cluster, Path.cwd()
    )
    runbook.run("kubectl --namespace mlflow scale deployment/mlflow --replicas=1", cluster, Path.cwd())
    assert replicas() == 1


def test_the_administrators_secret_takes_a_new_password_and_keeps_the_rest(cluster: clusters.Cluster) -> None:
    given = [f"--from-literal={pair}" for pair in ("username=admin", "password=old", "secret=forms")]
    cluster.kubectl("--namespace", "mlflow", "create", "secret", "generic", "mlflow-admin", *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEW", "a new one")
        runbook.run("kubectl --namespace mlflow patch secret mlflow-admin", cluster, Path.cwd())
    found = cluster.get("secret", "mlflow-admin", "--namespace", "mlflow")["data"]
    read = {name: base64.b64decode(value).decode() for name, value in found.items()}
    assert read == {"username": "admin", "password": "a new one", "secret": "forms"}
    runbook.run("kubectl --namespace mlflow rollout restart deployment/mlflow", cluster, Path.cwd())


def test_a_tenants_new_key_leaves_the_other_tenants_theirs(cluster: clusters.Cluster, tmp_path: Path) -> None:
    cluster.kubectl("create", "namespace", "bit")
    program, folders = Path(sys.executable).with_name("bit-serve-key"), (tmp_path / "first", tmp_path / "later")
    for folder, tenants in zip(folders, (("acme", "cats"), ("acme",)), strict=True):
        folder.mkdir()
        if folder == folders[1]:  # months later, where nobody has the file any more
            runbook.run("kubectl --namespace bit get secret inference-tenants", cluster, folder)
        for tenant in tenants:
            subprocess.run([program, tenant, "--file", "tenants.json"], cwd=folder, check=True, capture_output=True)
        runbook.run("kubectl --namespace bit create secret generic inference-tenants", cluster, folder)
    found = cluster.get("secret", "inference-tenants", "--namespace", "bit")["data"]["tenants.json"]
    kept = json.loads(base64.b64decode(found))
    before = json.loads((folders[0] / "tenants.json").read_text())
    assert kept["cats"] == before["cats"]
    assert len(kept["acme"]["keys"]) == 2
    assert set(before["acme"]["keys"]) < set(kept["acme"]["keys"])


def test_an_autoscaler_shows_what_it_knows(cluster: clusters.Cluster) -> None:
    cluster.kubectl("create", "namespace", "bit", status=None)  # may be there
    chart = str(runbook.ROOT / "charts/inference")
    cluster.helm("install", "inference", chart, "--namespace", "bit", "--set", "autoscaling.by=keda")
    found = clusters.wait_for(lambda: runbook.run("kubectl --namespace bit get scaledobject,hpa", cluster, Path.cwd()))
    assert "scaledobject.keda.sh/inference" in found
