"""Real Kubernetes control planes for the tests: API server, controllers, training operator, simulated nodes and a real one.

They come from a kit: the programs of a control plane (kube-apiserver, etcd, controllers, the training operator, kwok, helm) and
`cluster up|down`, which starts them as processes of this machine. It lies where BIT_K8S_KIT says; without it the tests that
need a cluster are skipped.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KIT = Path(os.environ.get("BIT_K8S_KIT", ROOT.parent / "shared" / "k8s"))
# Starts a process that outlives this one: python -c ORPHAN LOG COMMAND…; prints its id.
ORPHAN = """
import subprocess, sys
with open(sys.argv[1], "ab") as log:
    to = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    print(subprocess.Popen(sys.argv[2:], start_new_session=True, **to).pid)
"""


@dataclass(frozen=True)
class Cluster:
    """A running control plane. state: its folder, with logs; kubeconfig: an administrator's; bin: the kit's programs."""

    state: Path
    kubeconfig: Path
    bin: Path

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with KUBECONFIG and the kit's kubectl and helm first on PATH."""
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.bin}:{os.environ['PATH']}"}

    def kubectl(self, *arguments: str, stdin: str | None = None, status: int | None = 0) -> str:
        """Runs kubectl; returns all that it said. status: the exit status that is demanded, None for any."""
        command = [str(self.bin / "kubectl"), *arguments]
        done = subprocess.run(
            command, env=self.environment, input=stdin, capture_output=True, text=True, timeout=180, check=False
        )
        assert status is None or done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def helm(self, *arguments: str) -> str:
        """Runs the kit's helm; what it said. Raises AssertionError with its words where it fails."""
        command = [str(self.bin / "helm"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    @contextmanager
    def api_server_down(self, how: signal.Signals) -> Iterator[None]:
        """The API server does not answer (SIGSTOP), or is gone and starts anew at the end (SIGKILL)."""
        records = json.loads((self.state / "processes.json").read_text())
        [record] = [one for one in records if one["name"] == "kube-apiserver"]
        process = Path("/proc", str(record["pid"]))
        command = (process / "cmdline").read_text().split("\0")[:-1]
        os.kill(record["pid"], how)
        try:
            yield
        finally:
            if how == signal.SIGSTOP:
                os.kill(record["pid"], signal.SIGCONT)
            else:
                [port] = [int(word.partition("=")[2]) for word in command if word.startswith("--secure-port=")]
                wait_for(lambda: is_free(port))  # which it is a moment after the process is gone
                started = subprocess.run(
                    [sys.executable, "-c", ORPHAN, str(self.state / "kube-apiserver.log"), *command],
                    cwd=self.state, stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                pid = int(started.stdout)
                start = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19]
                record |= {"pid": pid, "start": start}  # `down` ends what stands there
                (self.state / "processes.json").write_text(json.dumps(records))
        wait_for(lambda: "ok" in self.kubectl("get", "--raw", "/readyz", status=None))

    def load(self, archive: Path) -> None:
        """An image archive into the real node."""
        subprocess.run([KIT / "cluster", "load", "--state", self.state, archive], check=True, timeout=300)


@contextmanager
def running(state: Path, parts: str = "kwok,training-operator") -> Iterator[Cluster]:
    """A cluster with `parts` (--with of the kit) while the context lasts. Skips the test where the kit is not there."""
    if not (KIT / "cluster").is_file():
        pytest.skip(f"no cluster kit at {KIT}; set BIT_K8S_KIT")
    unpacked = subprocess.run([KIT / "cluster", "unpack"], check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    command = [KIT / "cluster", "up", "--state", state, "--with", parts]
    try:
        up = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
        yield Cluster(state, Path(up.stdout.strip()), Path(unpacked.stdout.strip()))
    finally:
        subprocess.run([KIT / "cluster", "down", "--state", state], check=True, timeout=120)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def wait_for(what: Callable[[], Any], limit_s: float = 300, every_s: float = 0.2) -> Any:
    """Polls until `what()` is true; returns its value. Fails with its last value after `limit_s`."""
    until = time.monotonic() + limit_s
    while not (value := what()):
        assert time.monotonic() < until, f"not reached in {limit_s} s; last: {value!r}"
        time.sleep(every_s)
    return value
