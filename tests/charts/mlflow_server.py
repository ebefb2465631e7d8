"""charts/mlflow as processes: the rendered command and scripts of its containers, over SQLite and a folder or Postgres and S3."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.charts.helm import CHARTS, environment, pod_of, render
from training.demo.walk import free_port
from training.serve import process, wait_for

PASSWORD = "a/b%c"  # what an address must quote, and configparser too  # noqa: S105
ADMIN, SERVICE = ("admin", "a long password"), ("bit-serve", "another long password")
BUCKET = "bit-artifacts"
PROGRAMS = str(Path(sys.executable).parent)


@dataclass
class Backend:
    """What the values say of the database and the artifacts, what the Secrets hold, and the S3 server if there is one."""

    values: dict[str, str]
    secrets: dict[str, dict[str, str]]
    store: dict[str, str]


@dataclass
class Server:
    """A running server. folder: stands for the volume at /data; objects: the rendered chart."""

    url: str
    host: str
    folder: Path
    objects: dict[str, Any]
    backend: Backend
    process: ExitStack = field(default_factory=ExitStack)

    def given(self, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
        """The container's environment as the kubelet would make it, on this machine's paths and address."""
        found = environment({**pod, "containers": [container]})
        known = self.backend.secrets | {
            "mlflow-admin": {"username": ADMIN[0], "password": ADMIN[1], "secret": "forms"},
            "bit-serve-mlflow": {"username": SERVICE[0], "password": SERVICE[1]},
        }
        for name, value in found.items():
            if not isinstance(value, str):
                found[name] = known[value["secretKeyRef"]["name"]][value["secretKeyRef"]["key"]]
        for source in container.get("envFrom", []):
            found |= known[source["secretRef"]["name"]]
        return {name: self.here(value) for name, value in found.items()}

    def here(self, text: str) -> str:
        """What a container calls by the places of its mounts and the Service's name, as this machine calls it."""
        places = {"/etc/mlflow": CHARTS / "mlflow" / "files", "/data": self.folder, "/tmp": self.folder}  # noqa: S108
        text = re.sub(r"(?<![\w.-])(/etc/mlflow|/data|/tmp)\b", lambda found: str(places[found[0]]), text)
        return text.replace("http://bit-mlflow:", "http://127.0.0.1:").replace("http://127.0.0.1:5000", self.url)

    def start(self) -> None:
        """The init container's script, then the rendered command of the server."""
        done = self.run("Deployment")
        assert done.returncode == 0, done.stderr
        pod = pod_of(self.objects["Deployment"])
        container = pod["containers"][0]
        words = [self.here(word) for word in [*container["command"], *container["args"]]]
        words = [f"--port={self.url.rpartition(':')[2]}" if word == "--port=5000" else word for word in words]
        given = self.given(pod, container) | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        self.process.enter_context(process("mlflow", words, self.folder / "log", given))
        wait_for(f"{self.url}/health", 180, self.folder / "log")

    def stop(self) -> None:
        self.process.close()

    def run(self, workload: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The script of a CronJob (`CronJob/bit-mlflow-gc`), or of the init container (`Deployment`)."""
        pod = pod_of(self.objects[workload])
        container = pod["initContainers" if workload == "Deployment" else "containers"][0]
        return self.execute([*container["command"], *container.get("args", [])], pod, container, **more)

    def probe(self) -> subprocess.CompletedProcess[str]:
        """The readiness probe, as the kubelet runs it."""
        pod = pod_of(self.objects["Deployment"])
        container = pod["containers"][0]
        return self.execute(container["readinessProbe"]["exec"]["command"], pod, container)

    def execute(
        self, words: list[str], pod: dict[str, Any], container: dict[str, Any], **more: str
    ) -> subprocess.CompletedProcess[str]:
        command = [self.here(word) for word in words]
        path = f"{PROGRAMS}:{os.environ['PATH']}"
        given = os.environ | self.given(pod, container) | {"PATH": path} | more
        return subprocess.run(
            command, env=given, capture_output=True, text=True, check=False, timeout=180, cwd=self.folder
        )


@contextmanager
def sqlite() -> Iterator[Backend]:
    yield Backend({}, {}, {})


@contextmanager
def postgres_and_s3() -> Iterator[Backend]:
    """Debian's Postgres and moto's S3, each a server of its own on 127.0.0.1."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or os.geteuid() != 0:
        pytest.skip("no Postgres, or not root: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="bit-postgres-"))  # of its user, who may not look into root's folders
    shutil.chown(folder, "postgres", "postgres")
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    port, words = free_port(), folder / "password"
    words.write_text(PASSWORD)
    words.chmod(0o644)
    data = ["-D", str(folder / "data")]
    make = [str(found[-1] / "initdb"), *data, "--username=mlflow", "--auth=scram-sha-256", f"--pwfile={words}"]
    serve = [str(found[-1] / "postgres"), *data, "-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    try:
        subprocess.run([*user, *make, "--no-sync"], check=True, capture_output=True, cwd=folder)
        host, s3_port = s3.get_host_and_port()
        store = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        store["MLFLOW_S3_ENDPOINT_URL"] = f"http://{host}:{s3_port}"
        objects(store).create_bucket(Bucket=BUCKET)
        with process("postgres", [*user, *serve], folder / "log"):
            address = f"postgresql://mlflow:a%2Fb%25c@127.0.0.1:{port}/postgres"
            until_it_answers(found[-1] / "pg_isready", port)
            values = {"database__existingSecret": "mlflow-database", "artifacts__destination": f"s3://{BUCKET}/mlflow"}
            values["artifacts__existingSecret"] = "mlflow-s3"
            yield Backend(values, {"mlflow-database": {"uri": address}, "mlflow-s3": store}, store)
    finally:
        s3.stop()
        shutil.rmtree(folder)


def until_it_answers(ready: Path, port: int) -> None:
    command = [str(ready), "--quiet", "--host=127.0.0.1", f"--port={port}", "--timeout=1"]
    for _ in range(60):
        if subprocess.run(command, check=False).returncode == 0:
            return
        time.sleep(0.5)
    raise AssertionError("Postgres does not answer")


def objects(store: dict[str, str]) -> Any:
    """A client of the S3 server, with the server's own credentials."""
    return boto3.client(
        "s3",
        endpoint_url=store["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=store["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=store["AWS_SECRET_ACCESS_KEY"],
        region_name=store["AWS_DEFAULT_REGION"],
    )


def prepare(backend: Backend, folder: Path, **values: Any) -> Server:
    """The rendered chart over the backend; its Service has a free port of this machine, which becomes the server's own."""
    port = free_port()
    chart = render(
        "mlflow", service__port=port, serviceUser__existingSecret="bit-serve-mlflow", workers=1,
        gc={"enabled": True, "olderThan": "0s", "schedule": "41 3 * * 0"}, backup__keep=2,
        allowedHosts=["mlflow.example.test"], corsOrigins=["https://mlflow.example.test"], **backend.values, **values,
    )  # fmt: skip
    return Server(f"http://127.0.0.1:{port}", f"bit-mlflow.bit.svc:{port}", folder, chart, backend)
