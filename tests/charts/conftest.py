"""One API server for all tests of the charts, with KEDA's types and those of Prometheus' operator and the Gateway API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.clusters import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with clusters.running(tmp_path_factory.mktemp("charts"), "keda") as cluster:
        cluster.kubectl("apply", "-f", str(Path(__file__).with_name("crds.yaml")))
        cluster.kubectl("create", "namespace", "bit")
        cluster.kubectl("label", "namespace", "bit", "pod-security.kubernetes.io/enforce=restricted")
        for name in ("servicemonitors", "podmonitors", "prometheusrules"):
            cluster.kubectl("wait", "--for=condition=Established", f"crd/{name}.monitoring.coreos.com", "--timeout=60s")
        yield cluster
