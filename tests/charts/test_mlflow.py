"""charts/mlflow: what it renders, what it refuses, and the guard before `mlflow gc` on a real store."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.charts.helm import CHARTS, helm, pod_of, render


def test_the_guard_brings_back_what_an_alias_needs_and_gc_takes_the_rest(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(database)
    experiment = client.create_experiment("tests", str(tmp_path / "artifacts"))
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    client.create_registered_model("lamps")
    for run in runs:
        client.create_model_version("lamps", f"{tmp_path}/artifacts/{run}", run)
    client.set_registered_model_alias("lamps", "champion", "1")
    for run in runs:
        client.delete_run(run)
    guard = [sys.executable, str(CHARTS / "mlflow" / "files" / "guard.py")]
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_TRACKING_URI": database}
    said = subprocess.run(guard, env=environment, check=True, capture_output=True, text=True).stdout
    assert runs[0] in said
    assert runs[1] not in said
    script = pod_of(render("mlflow", "postgres")["CronJob/bit-mlflow-gc"])["containers"][0]["args"][0]
    assert script.startswith("python3 /etc/mlflow/guard.py && exec mlflow gc ")
    gc = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", database]
    subprocess.run(gc, env=environment, check=True, capture_output=True)
    assert client.get_run(runs[0]).info.lifecycle_stage == "active"
    with pytest.raises(Exception, match="not found"):
        client.get_run(runs[1])


def test_two_servers_never_share_sqlite() -> None:
    done = helm("template", "bit", CHARTS / "mlflow", "--set", "replicas=2")
    assert "replicas" in done.stderr
    assert render("mlflow")["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    assert render("mlflow", "postgres", replicas=2)["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"


@pytest.mark.parametrize(
    "wrong", ["artifacts.destination=/tmp", "auth.existingSecret=", "corsOrigin=x", "backup.keep=0"]
)
def test_a_wrong_value_is_refused_and_named(wrong: str) -> None:
    done = helm("template", "bit", CHARTS / "mlflow", "--set", wrong)
    assert done.returncode != 0
    assert wrong.split("=")[0].split(".")[-1] in done.stderr


def test_accounts_have_no_permission_by_default() -> None:
    config = render("mlflow")["ConfigMap"]["data"]["auth.ini"]
    assert "default_permission = NO_PERMISSIONS" in config
    assert yaml.safe_load((CHARTS / "mlflow" / "values.yaml").read_text())["auth"]["existingSecret"]
