"""A run that goes on: MLflow hangs, or knows more than this machine's file."""

import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from training import tracking


def test_an_mlflow_that_hangs_keeps_no_training_from_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BIT_MLFLOW_PATIENCE_S", "0.3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with tracking.start(uri, "pretrain", None, {}, {}, resume="abc", outbox=tmp_path) as run:
            run.metrics({"loss": 1.0}, 1)
        assert run.run_id == "abc"
    assert time.monotonic() - began < 10
    assert "did not answer for 0.3 s" in caplog.text


def test_a_figure_goes_on_after_the_later_of_what_mlflow_and_the_file_have(tmp_path: Path) -> None:
    uri, old = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "old"
    with tracking.start(uri, "pretrain", None, {}, {}, outbox=old) as run:
        run.metrics({"loss": 3.0}, 1)
        run.delivered(30)
    with tracking.start(uri, "pretrain", None, {}, {}, resume=run.run_id, outbox=tmp_path / "other machine") as run:
        run.metrics({"loss": 2.0}, 2)
        run.delivered(30)
    with tracking.start(uri, "pretrain", None, {}, {}, resume=run.run_id, outbox=old) as run:
        run.metrics({"loss": 2.0}, 2)
        run.metrics({"loss": 1.0}, 3)
        run.delivered(30)
    assert [point.step for point in MlflowClient(uri).get_metric_history(run.run_id, "loss")] == [1, 2, 3]
