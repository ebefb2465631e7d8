"""`bit serve`: MLflow's server with its UI and the inference service as child processes, started and stopped together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from training.config import Config, ConfigError
from training.tracking import sqlite_path

MLFLOW_START_S, SERVICE_START_S = 60, 30
# Without its job runners, which nothing here needs, MLflow's server is 2 processes with 0.5 GB instead of 10 with 2 GB.
MLFLOW_WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextmanager
def process(
    name: str, command: list[str], log: Path, environment: dict[str, str] | None = None, may_end: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that gets SIGTERM at the end, and SIGKILL if it is still there 35 s later. Output goes to `log`.

    Raises ConfigError where it ended before, unless it may.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,  # Ctrl-C reaches us alone; the children are stopped in order
        )
    try:
        yield child
        if child.poll() is not None and not may_end:
            raise ConfigError(f"{name} ended by itself (status {child.returncode}); its output is in {log}")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(timeout=35)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def running(
    tracking_uri: str, port: int, mlflow_port: int, children: list[subprocess.Popen[bytes]] | None = None
) -> Iterator[tuple[str, str]]:
    """Both servers, ready; yields their addresses (service, MLflow). An MLflow server that runs elsewhere is only used.

    children: gets their processes. Raises ConfigError where one does not start, or ended before the end.
    """
    children = [] if children is None else children
    service = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        database = sqlite_path(tracking_uri)
        mlflow = f"http://127.0.0.1:{mlflow_port}" if database else tracking_uri
        if database:
            _must_be_free(mlflow_port, "MLFLOW_PORT")
            command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
            command += ["--artifacts-destination", str(database.parent.resolve() / "artifacts"), "--workers", "1"]
            command += ["--host", "127.0.0.1", "--port", str(mlflow_port)]
            log = Path(".serve/mlflow.log")
            child = stack.enter_context(process("mlflow server", command, log, MLFLOW_WITHOUT_JOBS))
            children.append(child)
            wait_for(f"{mlflow}/health", MLFLOW_START_S, log, child)
        _must_be_free(port, "PORT")
        command = [sys.executable, "-m", "services.inference.app", "--port", str(port), "--tracking_uri", mlflow]
        log = Path(".serve/bit-serve.log")
        child = stack.enter_context(process("bit-serve", command, log))
        children.append(child)
        wait_for(f"{service}/v2/health/ready", SERVICE_START_S, log, child)
        yield service, mlflow


def wait_for(url: str, seconds: float, log: Path, child: subprocess.Popen[bytes] | None = None) -> None:
    """Until the address answers 200. Raises ConfigError when it doesn't in time, or once the child that should has ended."""
    end, said = time.monotonic() + seconds, f"did not answer within {seconds:.0f} s"
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2).status_code == 200:
                return
        if child is not None and child.poll() is not None:
            said = f"will not answer: its process ended (status {child.returncode})"
            break
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-800:] if log.is_file() else ""
    raise ConfigError(f"{url} {said}. The end of {log}:\n{tail}")


def watch(stop: threading.Event, children: list[subprocess.Popen[bytes]]) -> None:
    """Until told to stop, or one of the children ended."""
    while not stop.wait(0.2) and all(child.poll() is None for child in children):
        pass


def _must_be_free(port: int, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} is taken ({error.strerror}). Choose another: make serve {variable}=<port>"
            ) from None


def main(config: Config, port: int, mlflow_port: int) -> None:
    """Starts both, prints their addresses, stops both on Ctrl-C or SIGTERM. Raises ConfigError where one ends by itself."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    children: list[subprocess.Popen[bytes]] = []
    with running(config.tracking_uri, port, mlflow_port, children) as (service, mlflow):
        print(f"playground  {service}\nMLflow      {mlflow}\nCtrl-C stops both; logs are in .serve/", flush=True)
        watch(stop, children)
    print("stopped", flush=True)
