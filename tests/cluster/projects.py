"""Copies of the project that submit to a cluster of the tests, as a user has them, with tiny pictures; and their commands."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from tests.cluster.conftest import K8S
from tests.cluster.kubelet import HOLD
from tests.clusters import Cluster
from tests.conftest import draw_folder
from tests.e2e.test_pipeline import COPIED, PARAMS
from training.demo import data

ROOT = Path(__file__).parents[2]
CPU = {"pool": "cpu", "node_selector": {"cloud.google.com/gke-nodepool": "cpu"}, "cpu": "1", "memory": "1Gi"}
TENANT = "digits"


def fresh(root: Path, pack: bool = True, demo: bool = False) -> Path:
    """A repository with upstream pictures, one tenant and its pictures, upstream packed.

    demo: the demo's own pictures, with fewer of them upstream, in place of tiny drawn ones.
    """
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "pictures*", "dvc.lock", "*.partial", "textures")
        shutil.copytree(source, root / name, ignore=ignore) if source.is_dir() else shutil.copy(source, root / name)
    shutil.copytree(K8S, root / "k8s")
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"tracking_uri": f"sqlite:///{root}/.mlflow/mlflow.db"}))
    if demo:
        data.write(root, per_class=8)
        shutil.rmtree(root / "tenants" / "textures")
    else:
        draw_folder(root / "data" / "upstream", classes=4)
        draw_folder(root / "tenants" / TENANT / "pictures", classes=2, train=6, test=4)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    if not pack:
        return root
    run(root, "-m", "dvc", "add", "-q", "data/upstream", f"tenants/{TENANT}/pictures")
    run(root, "-m", "training", "pack")
    return root


def project(template: Path, root: Path, store: Path, *, seed: int, runner: str = "kubernetes", **values: Any) -> Path:
    """A copy of a `fresh` one with its own parameters. seed: of upstream training, so that tests on one cluster share no job.

    values: what differs in the sections of params.yaml.
    """
    shutil.copytree(template, root, symlinks=True)
    edit(
        root, lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"].update(annotations=HOLD)
    )
    params = yaml.safe_load((root / "params.yaml").read_text())
    given: dict[str, Any] = {
        "pretrain": {"seed": seed},
        "finetune": {"scratch": False},
        "cluster": {
            "image": "bit-training@sha256:" + "0" * 64,
            "store": f"file://{store}",
            "remote": str(root / ".dvc-remote"),
            "queue": None,
            "pretrain": CPU,
            "finetune": CPU,
        },
    }
    params |= {"runner": runner, "tracking_uri": f"sqlite:///{root}/.mlflow/mlflow.db"}
    for source in (given, values):
        for section, own in source.items():
            params[section] = params.get(section, {}) | own if isinstance(own, dict) else own
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def drawn() -> int:
    """A seed that no job of the cluster has had: a test that is tried again is not to meet its earlier job."""
    return secrets.randbelow(2**31)


def edit(root: Path, change: Callable[[Any], object], names: tuple[str, ...] = ("pretrain", "finetune")) -> None:
    """Changes the PyTorchJobs of a project's k8s/, as a user edits them."""
    for name in names:
        path = root / "k8s" / f"{name}.yaml"
        objects = list(yaml.safe_load_all(path.read_text()))
        for made in objects:
            if made["kind"] == "PyTorchJob":
                change(made)
        path.write_text(yaml.safe_dump_all(objects))


def environment(root: Path, cluster: Cluster | None = None) -> dict[str, str]:
    return (cluster.environment if cluster else dict(os.environ)) | {
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


def run(root: Path, *arguments: str, cluster: Cluster | None = None, status: int = 0) -> str:
    """Python with these arguments in the project; all that it said."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment(root, cluster),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def bit(root: Path, cluster: Cluster, *arguments: str, status: int = 0) -> str:
    return run(root, "-m", "training", *arguments, cluster=cluster, status=status)


class Command:
    """A command that runs beside the test, and ends with it at the latest. log: what it said so far."""

    started: ClassVar[list["Command"]] = []

    def __init__(self, root: Path, cluster: Cluster | None, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], cwd=root, env=environment(root, cluster),
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        self.started.append(self)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self, status: int = 0, limit_s: float = 900) -> str:
        """Waits for its end; all that it said."""
        try:
            assert self.process.wait(limit_s) == status, self.log
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended in {limit_s:.0f} s; said:\n{self.log}") from None
        return self.log


def receipt(root: Path, stage: str) -> dict[str, Any]:
    return json.loads((root / "runs" / stage / "receipt.json").read_text())
