"""The manifests on a real API server: accepted, admitted, scheduled."""

from tests.clusters import Cluster


def test_the_simulated_nodes_are_ready(cluster: Cluster) -> None:
    assert {node["metadata"]["name"] for node in cluster.get("nodes")["items"]} >= {"gpu-0", "gpu-spot-0", "tpu-0"}
