"""charts/mlflow: what it renders and what it refuses. (test_mlflow_server.py starts it.)"""

import pytest
import yaml

from tests.charts.helm import CHARTS, environment, helm, pod_of, render


def test_two_servers_never_share_sqlite() -> None:
    done = helm("template", "bit", CHARTS / "mlflow", "--set", "replicas=2")
    assert "replicas" in done.stderr
    assert render("mlflow")["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    assert render("mlflow", "postgres", replicas=2)["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"


@pytest.mark.parametrize(
    "wrong",
    ["database.url=mysql://db", "artifacts.destination=/tmp", "auth.existingSecret=", "corsOrigin=x", "backup.keep=0"],
)
def test_a_wrong_value_is_refused_and_named(wrong: str) -> None:
    done = helm("template", "bit", CHARTS / "mlflow", "--set", wrong)
    assert done.returncode != 0
    assert wrong.split("=")[0].split(".")[-1] in done.stderr


def test_postgres_comes_by_url_or_from_a_secret_never_both() -> None:
    url = "postgresql://mlflow@db.example.test/mlflow"
    for job in ("Deployment", "CronJob/bit-mlflow-backup", "CronJob/bit-mlflow-gc"):
        given = environment(pod_of(render("mlflow", database__url=url, gc__enabled=True)[job]))
        assert given["MLFLOW_BACKEND_STORE_URI"] == url
    assert render("mlflow", database__url=url, replicas=2)["Deployment"]["spec"]["replicas"] == 2
    both = ["--set", f"database.url={url}", "--set", "database.existingSecret=mlflow-database"]
    done = helm("template", "bit", CHARTS / "mlflow", *both)
    assert done.returncode != 0
    assert "database" in done.stderr


def test_accounts_are_needed_and_a_server_that_needs_no_volume_mounts_none() -> None:
    assert yaml.safe_load((CHARTS / "mlflow" / "values.yaml").read_text())["auth"]["existingSecret"]
    assert "data" in {one["name"] for one in pod_of(render("mlflow")["Deployment"])["volumes"]}
    assert "data" not in {one["name"] for one in pod_of(render("mlflow", "postgres")["Deployment"])["volumes"]}


def test_the_server_alone_has_the_account_that_opens_the_store() -> None:
    objects = render("mlflow", "gcs", serviceUser__existingSecret="bit-serve-mlflow")
    account = objects["ServiceAccount"]
    assert account["metadata"]["annotations"]["iam.gke.io/gcp-service-account"] == "mlflow@bit.iam.gserviceaccount.com"
    assert account["automountServiceAccountToken"] is False
    pods = {name: pod_of(one) for name, one in objects.items() if name.startswith(("Deployment", "CronJob", "Job"))}
    assert len(pods) == 4
    assert {name: pod.get("serviceAccountName") for name, pod in pods.items()} == {
        name: "bit-mlflow" if name == "Deployment" else None for name in pods
    }
    for pod in pods.values():  # the clouds' webhooks bring a token of their own
        assert pod["automountServiceAccountToken"] is False
        assert pod["imagePullSecrets"] == [{"name": "registry"}]


def test_an_account_of_yours_is_taken() -> None:
    for name, taken in (("theirs", "theirs"), ("", "default")):
        objects = render("mlflow", serviceAccount__create=False, serviceAccount__name=name)
        assert "ServiceAccount" not in objects
        assert pod_of(objects["Deployment"])["serviceAccountName"] == taken
    made = render("mlflow", serviceAccount__name="artifacts")
    assert made["ServiceAccount"]["metadata"]["name"] == "artifacts"
    assert pod_of(made["Deployment"])["serviceAccountName"] == "artifacts"
