"""Plays the kubelet for simulated pods: starts each pod's own command with its own environment as a local process.

What the operator rendered is what runs; only addresses become 127.0.0.1, mounted paths become folders, and the pod's end (exit
status, termination message) is written into its status, as a kubelet does.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.clusters import Cluster
from training.demo.walk import free_port

ROOT = Path(__file__).parents[2]


class Kubelet(threading.Thread):
    """Runs all pods of namespace `bit` that appear until `stop`. code: where `training` is imported from."""

    def __init__(self, cluster: Cluster, folder: Path, code: Path) -> None:
        super().__init__(name="kubelet", daemon=True)
        self.cluster, self.folder, self.code = cluster, folder, code
        self.processes: dict[str, subprocess.Popen[bytes]] = {}  # pod's uid → process
        self.names: dict[str, str] = {}
        self.told: set[str] = set()
        self.ports: dict[str, int] = {}  # rendezvous name → port of this machine
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.3):
            pods = {pod["metadata"]["uid"]: pod for pod in self.cluster.get("pods", "-n", "bit")["items"]}
            for uid, pod in pods.items():
                if uid not in self.processes and pod["status"].get("phase") == "Running":
                    self._start(uid, pod)
                elif uid in self.processes and pod["metadata"].get("deletionTimestamp"):
                    self._terminate(uid)
            for uid, process in self.processes.items():
                if process.poll() is not None and uid in pods and uid not in self.told:
                    self._tell(uid, pods[uid], process.returncode)
                elif uid not in pods:
                    self._terminate(uid)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    def process_of(self, name: str) -> "subprocess.Popen[bytes] | None":
        """The process of the newest pod of that name."""
        found = [uid for uid in self.processes if self.names[uid] == name]
        return self.processes[found[-1]] if found else None

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}-*/log")))

    def _start(self, uid: str, pod: dict[str, Any]) -> None:
        [container] = pod["spec"]["containers"]
        name, job = pod["metadata"]["name"], pod["metadata"]["labels"]["bit/job"]
        work, project = self.folder / f"{name}-{uid}", self.folder / job / "project"
        work.mkdir(parents=True)
        data = self.cluster.get("configmap", job, "-n", "bit")["data"]
        [items] = [volume["configMap"]["items"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
        for item in items:
            (project / item["path"]).parent.mkdir(parents=True, exist_ok=True)
            (project / item["path"]).write_text(data[item["key"]])
        shared = self.folder / job / "checkpoints"
        shared.mkdir(exist_ok=True)
        (work / ".checkpoints").symlink_to(shared)
        given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        if endpoint := given.get("PET_RDZV_ENDPOINT"):
            port = self.ports.setdefault(endpoint, free_port())
            given["PET_RDZV_ENDPOINT"] = f"127.0.0.1:{port}"
        environment = os.environ | given
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.code),
            "BIT_PROJECT": str(project),
            "BIT_TERMINATION_LOG": str(work / "termination"),
            "OMP_NUM_THREADS": "1",
            "PET_LOCAL_ADDR": "127.0.0.1",
        }
        environment.pop("BIT_METRICS_PORT", None)  # pods of one machine would ask for the same port
        with (work / "log").open("wb") as log:
            self.names[uid] = name
            self.processes[uid] = subprocess.Popen(
                container["command"], cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _terminate(self, uid: str) -> None:
        process = self.processes[uid]
        if process.poll() is None and uid not in self.told:
            self.told.add(uid)
            process.send_signal(signal.SIGTERM)

    def _tell(self, uid: str, pod: dict[str, Any], status: int) -> None:
        self.told.add(uid)
        work = self.folder / f"{pod['metadata']['name']}-{uid}"
        message = work / "termination"
        last = message.read_text() if message.exists() else (work / "log").read_text()[-2000:]
        ended = {"exitCode": status % 256, "reason": "Completed" if status == 0 else "Error", "message": last}
        [told] = pod["status"]["containerStatuses"]
        told |= {"ready": False, "state": {"terminated": ended}}
        patch = {"status": {"phase": "Succeeded" if status == 0 else "Failed", "containerStatuses": [told]}}
        name = pod["metadata"]["name"]
        arguments = ("patch", "pod", name, "-n", "bit", "--subresource=status", "--type=merge", "-p", json.dumps(patch))
        self.cluster.kubectl(*arguments)
