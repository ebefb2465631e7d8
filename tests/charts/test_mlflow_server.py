"""charts/mlflow: its rendered command started for real, asked by the Service's name; accounts, backups, garbage collection."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.charts import mlflow_server
from tests.charts.mlflow_server import ADMIN, BUCKET, SERVICE, Server, objects, prepare
from tests.clusters import wait_for
from tests.operations import runbook
from tests.services.exports import export, gray_png
from tests.services.running import MLflow, bit_serve

pytestmark = pytest.mark.heavy  # an MLflow server with accounts takes a core for itself while it starts
SEARCH = "/api/2.0/mlflow/registered-models/search"


@pytest.fixture(scope="module", params=["sqlite", "postgres_and_s3"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with getattr(mlflow_server, request.param)() as backend:
        server = prepare(backend, tmp_path_factory.mktemp("mlflow"))
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def store(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflow]:
    """The administrator as a publisher, with one champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN[1])
        store = MLflow(server.url, tmp_path_factory.mktemp("publisher"))
        store.publish("lamps", export())
        yield store


def test_the_services_name_is_a_host_and_another_is_not(server: Server) -> None:
    def asked(host: str, auth: tuple[str, str] | None = ADMIN) -> int:
        return httpx.get(server.url + SEARCH, timeout=60, headers={"Host": host}, auth=auth).status_code

    assert asked(server.host) == 200
    assert asked(server.host, None) == 401
    assert asked("mlflow.example.test") == 200
    assert asked("evil.example.test") == 403


def test_a_browsers_page_may_call_it_from_the_named_origin_alone(server: Server) -> None:
    def changed(origin: str) -> int:
        headers = {"Host": server.host, "Origin": origin}
        body = {"name": origin.partition("//")[2]}
        url = f"{server.url}/api/2.0/mlflow/registered-models/create"
        status = httpx.post(url, headers=headers, auth=ADMIN, timeout=60, json=body).status_code
        httpx.request("DELETE", url.replace("create", "delete"), auth=ADMIN, timeout=60, json=body)
        return status

    assert changed("https://mlflow.example.test") == 200
    assert changed("https://evil.example.test") == 403


def test_it_is_ready_and_without_host_or_account_it_would_not_be(server: Server, tmp_path: Path) -> None:
    said = server.probe()
    assert said.returncode == 0, said.stderr
    pod = mlflow_server.pod_of(server.objects["Deployment"])
    container = pod["containers"][0]
    words = container["readinessProbe"]["exec"]["command"]
    assert words[-1] == server.host
    foreign = server.execute([*words[:-1], "evil.example.test"], pod, container)
    assert "403" in foreign.stderr
    assert foreign.returncode == 1
    nobody = server.execute(words, pod, container, MLFLOW_AUTH_ADMIN_PASSWORD="wrong")  # noqa: S106
    assert "401" in nobody.stderr
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example.test"}).status_code == 200  # so no measure


def test_it_is_not_ready_while_its_database_is_away(server: Server) -> None:
    if "mlflow-database" not in server.backend.secrets:
        pytest.skip("a database that is a file of the server's own volume is not away")
    address = server.backend.secrets["mlflow-database"]["uri"]
    beside = psycopg.connect(address.replace("/postgres", "/template1"), autocommit=True)
    with beside:
        beside.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS false")
        beside.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'")
        try:
            assert server.probe().returncode == 1
        finally:
            beside.execute("ALTER DATABASE postgres ALLOW_CONNECTIONS true")
    wait_for(lambda: server.probe().returncode == 0, 60)


def test_the_services_account_may_read_what_is_served_and_change_nothing(
    server: Server, store: MLflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = httpx.Client(base_url=server.url, auth=SERVICE, timeout=60)
    assert ask.get(SEARCH).status_code == 401
    for _ in range(2):  # the second time there is nothing to do, and no error
        done = server.run("Job")
        assert done.returncode == 0, done.stderr
    assert [one["name"] for one in ask.get(SEARCH).json()["registered_models"]] == ["lamps"]
    moved = {"name": "lamps", "alias": "champion", "version": "1"}
    assert ask.post("/api/2.0/mlflow/registered-models/alias", json=moved).status_code == 403
    assert ask.delete("/api/2.0/mlflow/registered-models/delete", params={"name": "lamps"}).status_code in (403, 405)
    other = store.client.create_registered_model("other").name  # later than the account
    assert ask.get("/api/2.0/mlflow/registered-models/get", params={"name": other}).status_code == 200
    store.client.delete_registered_model(other)
    assert ask.get("/api/2.0/mlflow/experiments/get", params={"experiment_id": store.experiment}).status_code == 403
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", SERVICE[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SERVICE[1])
    with bit_serve(store, tmp_path, "--write_back", "false") as service:
        assert service.classify("lamps", gray_png(200)).json()["predictions"][0]["class"] == "bright"
    ask.close()


def test_artifacts_are_where_the_values_say(server: Server, store: MLflow) -> None:
    if server.backend.store:
        found = objects(server.backend.store).list_objects_v2(Bucket=BUCKET, Prefix="mlflow/")["Contents"]
        assert [one["Key"] for one in found if one["Key"].endswith("/model.onnx")]
    else:
        assert list((server.folder / "artifacts").rglob("model.onnx"))


def test_garbage_collection_spares_what_an_alias_needs(server: Server, store: MLflow) -> None:
    kept = store.client.get_model_version("lamps", "1").run_id
    lost = store.client.create_run(store.experiment).info.run_id
    for run in (kept, lost):
        store.client.delete_run(run)
    done = server.run("CronJob/bit-mlflow-gc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run {kept} restored" in done.stdout
    assert store.client.get_run(kept).info.lifecycle_stage == "active"
    query = {"name": "lamps", "version": "1", "path": "model.onnx"}
    answer = httpx.get(f"{server.url}/model-versions/get-artifact", params=query, auth=ADMIN, timeout=60)
    assert answer.content == (store.folder / "model.onnx").read_bytes()
    with pytest.raises(Exception, match="not found"):
        store.client.get_run(lost)


def test_the_administrators_password_changes_by_the_runbooks_request_and_not_by_the_secret(server: Server) -> None:
    lines = [line for line in runbook.LINES if line.startswith("BODY=") or "update-password" in line]

    def change(old: str, new: str) -> None:
        command = ["sh", "-ec", "\n".join(lines).replace("http://127.0.0.1:5000", server.url)]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OLD": old, "NEW": new})

    def asked(password: str) -> int:
        return httpx.get(server.url + SEARCH, timeout=60, auth=(ADMIN[0], password)).status_code

    change(ADMIN[1], "a new password")
    server.stop()
    server.start()  # with the Secret of before
    assert (asked("a new password"), asked(ADMIN[1])) == (200, 401)
    assert server.probe().returncode != 0  # so the Secret must follow
    change("a new password", ADMIN[1])
    assert asked(ADMIN[1]) == 200


def test_a_backup_is_restored_as_the_runbook_says(server: Server, store: MLflow) -> None:
    """Last, because it goes back in time: a model that was made after the backup is gone, the one before is there."""
    backups = server.folder / "backups"
    for number in range(3):
        for name in ("postgres/mlflow-2020010%dT000000Z.dump", "mlflow/mlflow-2020010%dT000000Z.db"):
            path = backups / (name % number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    done = server.run("CronJob/bit-mlflow-backup")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = backups / ("postgres" if server.backend.store else "mlflow")
    kept = sorted(folder.iterdir())
    assert len(kept) == 2, "values say keep: 2"
    store.client.create_registered_model("later")
    server.stop()
    restore(server, kept[-1])
    server.start()
    names = [model.name for model in store.client.search_registered_models()]
    assert names == ["lamps"]
    assert store.client.get_model_version_by_alias("lamps", "champion").version == "1"


def restore(server: Server, backup: Path) -> None:
    """docs/operations.md, Restore the database."""
    if server.backend.store:
        address = server.backend.secrets["mlflow-database"]["uri"]
        line = runbook.command("pg_restore").replace("mlflow.dump", str(backup))
        subprocess.run(["sh", "-c", line], check=True, capture_output=True, env=os.environ | {"DATABASE_URL": address})
    else:
        for name in ("mlflow", "accounts"):
            shutil.copy(sorted((server.folder / "backups" / name).iterdir())[-1], server.folder / f"{name}.db")
