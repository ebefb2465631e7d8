"""The runbook's commands that need no running pod, against a real API server and KEDA's types."""

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


def test_an_autoscaler_shows_what_it_knows(cluster: clusters.Cluster) -> None:
    cluster.kubectl("create", "namespace", "bit")
    chart = str(runbook.ROOT / "charts/inference")
    cluster.helm("install", "inference", chart, "--namespace", "bit", "--set", "autoscaling.by=keda")
    found = clusters.wait_for(lambda: runbook.run("kubectl --namespace bit get scaledobject,hpa", cluster, Path.cwd()))
    assert "scaledobject.keda.sh/inference" in found
