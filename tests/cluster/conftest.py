"""One control plane for all tests of a session that want it, with the namespace `bit` as `kubectl apply -k k8s/` makes it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clusters
from tests.clusters import Cluster

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
VOLUME = """
apiVersion: v1
kind: PersistentVolume
metadata: {name: checkpoints}
spec:
  accessModes: [ReadWriteMany]
  capacity: {storage: 1Ti}
  hostPath: {path: /nowhere}
  claimRef: {namespace: bit, name: bit-checkpoints}
"""


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Ends the commands that a failed test left behind."""
    from tests.cluster.projects import Command  # which imports this file

    yield
    while Command.started:
        Command.started.pop().kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with clusters.running(tmp_path_factory.mktemp("cluster"), "kwok,training-operator,kueue-crds") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def prepared(cluster: Cluster) -> Cluster:
    """The namespace and all that `kubectl apply -k k8s/` brings, and a volume for the checkpoints."""
    cluster.kubectl("apply", "--server-side", "-k", str(K8S))
    cluster.kubectl("apply", "--server-side", "-f", "-", stdin=VOLUME)
    cluster.kubectl("wait", "-n", "bit", "pvc/bit-checkpoints", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s")
    return cluster


def person(cluster: Cluster, name: str, *roles: str) -> Cluster:
    """The cluster as somebody sees it who is bound to these roles: NAMESPACE/ROLE, or a ClusterRole."""
    cluster.kubectl("create", "serviceaccount", name, "-n", "default")
    for role in roles:
        namespace, _, own = role.rpartition("/")
        kind = (
            ("rolebinding", name, "-n", namespace, "--role")
            if namespace
            else ("clusterrolebinding", name, "--clusterrole")
        )
        cluster.kubectl("create", *kind, own, "--serviceaccount", f"default:{name}")
    given = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    given["users"][0]["user"] = {"token": cluster.kubectl("create", "token", name, "-n", "default").strip()}
    path = cluster.state / f"{name}.kubeconfig"
    path.write_text(json.dumps(given))
    return dataclasses.replace(cluster, kubeconfig=path)


@pytest.fixture(scope="session")
def submitter(prepared: Cluster) -> Cluster:
    """The cluster for somebody with the Role `submitter` and no other right."""
    return person(prepared, "submitter", "bit/submitter")
