"""The watch on a real API server that is killed, starts anew and has forgotten where the watch was."""

import json
import signal
import threading

import pytest
import yaml

from tests.cluster.conftest import ROOT
from tests.clusters import Cluster, wait_for
from training.cluster.jobs import Jobs
from training.cluster.manifests import Order, render
from training.config import ClusterConfig

pytestmark = pytest.mark.heavy
PATH = "/apis/kubeflow.org/v1/namespaces/bit/pytorchjobs"
NAME = "bit-pretrain-watched"


def test_a_watch_goes_on_when_its_place_in_the_history_is_gone(
    prepared: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ClusterConfig(image=f"x@sha256:{'1' * 64}", store="s3://b", queue=None)
    config_map, job = render(Order(NAME, "pretrain", None, {"params.yaml": "{}"}), given, ROOT)
    job["spec"]["runPolicy"]["suspend"] = True
    prepared.kubectl("apply", "--server-side", "-n", "bit", "-f", "-", stdin=yaml.safe_dump_all([config_map, job]))
    monkeypatch.setenv("KUBECONFIG", str(prepared.kubeconfig))
    seen: list[str] = []
    over = threading.Event()

    def follow() -> None:
        for news in Jobs(given).watch(f"bit/job={NAME}", pause_s=1):
            if over.is_set():
                return
            if news:
                gone = news.get("removed", False)
                seen.append("gone" if gone else news["metadata"].get("annotations", {}).get("turn", "0"))

    watching = threading.Thread(target=follow)
    watching.start()
    try:
        wait_for(lambda: "0" in seen)
        version = json.loads(prepared.kubectl("get", "--raw", PATH))["metadata"]["resourceVersion"]
        prepared.kubectl("annotate", "pytorchjob", NAME, "-n", "bit", "turn=1")
        wait_for(lambda: "1" in seen)
        with prepared.api_server_down(signal.SIGKILL):
            pass
        said = prepared.kubectl(
            "get", "--raw", f"{PATH}?watch=1&resourceVersion={version}&timeoutSeconds=1", status=None
        )
        assert '"code":410' in said or "too old resource version" in said, said
        prepared.kubectl("annotate", "pytorchjob", NAME, "-n", "bit", "turn=2", "--overwrite")
        wait_for(lambda: "2" in seen)
        assert "gone" not in seen
        prepared.kubectl("delete", "pytorchjob", NAME, "-n", "bit")
        wait_for(lambda: "gone" in seen)
    finally:
        over.set()
        watching.join(60)
    assert not watching.is_alive()
