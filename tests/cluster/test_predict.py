"""k8s/predict.yaml on a real API server under Pod Security `restricted`, and its command against the command line."""

import typer.main
import yaml

from tests.cluster.conftest import K8S
from tests.clusters import Cluster, wait_for
from training.cli import build

FILE = K8S / "predict.yaml"


def test_every_slice_gets_a_pod_and_the_job_completes(prepared: Cluster) -> None:
    said = prepared.kubectl("apply", "--server-side", "-n", "bit", "-f", str(FILE))
    assert "violate PodSecurity" not in said
    try:
        done = wait_for(lambda: prepared.get("job", "-n", "bit", "bit-predict-acme")["status"].get("completedIndexes"))
        wait_for(
            lambda: prepared.get("job", "-n", "bit", "bit-predict-acme")["status"].get("completedIndexes") == "0-7"
        )
        assert done
        pods = prepared.get("pods", "-n", "bit", "-l", "job-name=bit-predict-acme")["items"]
        indexes = {pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for pod in pods}
        assert indexes == {str(n) for n in range(8)}
        [container] = pods[0]["spec"]["containers"]
        env = {variable["name"]: variable for variable in container["env"]}
        assert "JOB_COMPLETION_INDEX" in env
        label = env["BIT_PREDICT_RUN"]["valueFrom"]["fieldRef"]["fieldPath"].split("'")[1]
        uid = prepared.get("job", "-n", "bit", "bit-predict-acme")["metadata"]["uid"]
        assert {pod["metadata"]["labels"][label] for pod in pods} == {uid}
    finally:
        prepared.kubectl("delete", "--ignore-not-found", "-n", "bit", "-f", str(FILE))


def test_the_pod_is_hardened_and_its_command_is_understood() -> None:
    _, job = yaml.safe_load_all(FILE.read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["command"][:3] == ["python", "-m", "training"]
    root = typer.main.get_command(build())
    command = root.commands["predict"]  # type: ignore[attr-defined]
    told = command.make_context("predict", container["command"][4:]).params
    assert told["slices"] == job["spec"]["completions"]
    assert str(told["workers"]) == container["resources"]["limits"]["cpu"]
