"""The service as a process, and the two places that it can follow, from the publisher's side."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import httpx
from mlflow import MlflowClient

from tests.services.exports import gray_png
from training.demo.walk import free_port
from training.serve import MLFLOW_WITHOUT_JOBS, process, wait_for

FOLLOWED_WITHIN_S = 5.0


class Store(Protocol):
    """Where a test publishes versions: the two implementations of the registry, from the publisher's side."""

    flags: list[str]

    def publish(self, tenant: str, data: bytes, sha256: str | None = None) -> str:
        """Makes `data` the champion; returns the version's name."""


class Folder:
    def __init__(self, folder: Path) -> None:
        self.folder, self.flags = folder, ["--models", str(folder)]

    def publish(self, tenant: str, data: bytes, sha256: str | None = None) -> str:
        temporary = self.folder / f".{tenant}.tmp"
        temporary.write_bytes(data)
        temporary.rename(self.folder / f"{tenant}.onnx")
        return hashlib.sha256(data).hexdigest()[:12]


class MLflow:
    def __init__(self, uri: str, folder: Path) -> None:
        self.client, self.folder = MlflowClient(uri), folder
        self.flags = ["--tracking_uri", uri, "--cache_dir", str(folder / "cache")]
        self.experiment = self.client.create_experiment("tests")
        self.known: set[str] = set()

    def publish(self, tenant: str, data: bytes, sha256: str | None = None, validation: str = "passed") -> str:
        path = self.folder / "model.onnx"
        path.write_bytes(data)
        run = self.client.create_run(self.experiment)
        self.client.log_artifact(run.info.run_id, str(path), "export")
        if tenant not in self.known:
            self.client.create_registered_model(tenant)
            self.known.add(tenant)
        tags = {"sha256": sha256 or hashlib.sha256(data).hexdigest(), "validation": validation}
        source = f"{run.info.artifact_uri}/export"
        made = self.client.create_model_version(tenant, source, run.info.run_id, tags=tags)
        self.client.set_registered_model_alias(tenant, "champion", made.version)
        return str(made.version)


class Service:
    def __init__(self, url: str, store: Store, running: subprocess.Popen[bytes], log: Path) -> None:
        self.url, self.store, self.process, self.log = url, store, running, log
        self.http = httpx.Client(base_url=url, timeout=30)

    def classify(self, tenant: str, picture: bytes, query: str = "") -> httpx.Response:
        return self.http.post(f"/v1/{tenant}/classify{query}", content=picture)

    def wait_until(self, tenant: str, version: str) -> float:
        """Seconds until the tenant is served by that version."""
        began = time.monotonic()
        while time.monotonic() - began < FOLLOWED_WITHIN_S:
            answer = self.classify(tenant, gray_png(10))
            if answer.status_code == 200 and answer.json()["version"] == version:
                return time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"{tenant} is not served by {version}: {answer.text}")


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """A real MLflow server on SQLite; yields its address. port: default any free one."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--workers", "1", "--port", str(port)]
    with process("mlflow", command, folder / "mlflow.log", MLFLOW_WITHOUT_JOBS) as running:
        wait_for(f"http://127.0.0.1:{port}/health", 180, folder / "mlflow.log", running)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def bit_serve(
    store: Store, folder: Path, *flags: str, ready: bool = True, stopped_by_test: bool = False
) -> Iterator[Service]:
    """A running service. ready: wait until it is; stopped_by_test: that the process ends before the test is no failure."""
    port = free_port()
    command = [sys.executable, "-m", "services.inference.app", "--port", str(port), "--poll_interval_s", "0.3"]
    log = folder / f"serve-{port}.log"
    with process("bit-serve", [*command, *store.flags, *flags], log, may_end=stopped_by_test) as running:
        page = "ready" if ready else "live"
        wait_for(f"http://127.0.0.1:{port}/v2/health/{page}", 30, log, running)
        service = Service(f"http://127.0.0.1:{port}", store, running, log)
        yield service
        service.http.close()
