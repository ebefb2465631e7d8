"""Plays the kubelet for simulated pods: starts each pod's own command with its own environment as a local process.

What the operator rendered is what runs; only addresses become 127.0.0.1 and mounted paths become folders. Like a kubelet it
restarts a container in place as the pod's restartPolicy says, ends the process of a pod that is deleted by SIGTERM and then
SIGKILL, tells how a container ended (exit status, termination message) in the pod's status, and outlives the API server.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from tests.clusters import Cluster
from training.demo.walk import free_port

Object = dict[str, Any]
SELECTOR = "app.kubernetes.io/part-of=bit"
HOLD = {"pod-complete.stage.kwok.x-k8s.io/delay": "1h"}  # kwok does not end these pods: they are this kubelet's


class Container:
    """One pod's process, through all its restarts. work: its working directory, which holds the log of every start."""

    def __init__(self, pod: Object, work: Path, environment: dict[str, str]) -> None:
        self.pod, self.work, self.environment = pod, work, environment
        self.name, self.namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        self.restarts = 0
        self.asked_to_end: float | None = None  # when SIGTERM was sent
        self.told = False  # its end stands in the pod's status
        self.process = self._start()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        """SIGTERM once, SIGKILL to the whole container when the pod's grace period is over."""
        if not self.alive:
            return
        if self.asked_to_end is None:
            self.asked_to_end = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.asked_to_end > self.pod["spec"]["terminationGracePeriodSeconds"]:
            self.kill()

    def kill(self) -> None:
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ended(self) -> Object:
        """How the last process ended, as a container status tells it."""
        status = self.process.returncode
        code = status if status >= 0 else 128 - status
        message = self.work / "termination"
        last = message.read_text() if message.exists() else self._log().read_text()[-2000:]
        return {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "message": last}

    def restart(self) -> None:
        self.restarts += 1
        self.process = self._start()

    def _log(self) -> Path:
        return self.work / f"log-{self.restarts}"

    def _start(self) -> "subprocess.Popen[bytes]":
        (self.work / "termination").unlink(missing_ok=True)
        [container] = self.pod["spec"]["containers"]
        with self._log().open("wb") as log:
            return subprocess.Popen(
                container["command"],
                cwd=self.work,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class Kubelet(threading.Thread):
    """Runs the project's pods that appear until `stop`. code: where `training` is imported from."""

    def __init__(self, cluster: Cluster, folder: Path, code: Path) -> None:
        super().__init__(name="kubelet", daemon=True)
        settings = client.Configuration()
        config.load_kube_config(str(cluster.kubeconfig), client_configuration=settings)
        settings.retries = False
        self.core = client.CoreV1Api(client.ApiClient(settings))
        self.folder, self.code = folder, code
        self.containers: dict[str, Container] = {}  # by the pod's uid, oldest first
        self.ports: dict[str, int] = {}  # rendezvous name → port of this machine
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.2):
            try:
                self._sync()
            except urllib3.exceptions.HTTPError:
                continue  # the API server is away: containers go on
            except ApiException as error:
                if error.status not in (404, 409, 429, 500, 503):  # gone meanwhile, or starting
                    raise

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()
        for container in self.containers.values():
            container.kill()

    def container(self, name: str) -> Container | None:
        """The newest of the pod of that name."""
        return next(reversed(self.all_of(name)), None)

    def all_of(self, name: str) -> list[Container]:
        """Those of all pods that had this name, oldest first."""
        return [one for one in list(self.containers.values()) if one.name == name]  # a copy: the thread adds to it

    def log(self, name: str) -> str:
        """All that the pod (or the pods) whose name begins so printed, through all restarts."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}*/log-*")))

    def _sync(self) -> None:
        answer = self.core.list_pod_for_all_namespaces(
            label_selector=SELECTOR, _preload_content=False, _request_timeout=(2, 10)
        )
        pods = {pod["metadata"]["uid"]: pod for pod in json.loads(answer.data)["items"]}
        for uid, container in self.containers.items():
            pod = pods.get(uid)
            if pod is None or pod["metadata"].get("deletionTimestamp"):
                container.terminate()
            elif not container.alive and not container.told:
                self._tell(container, pod)
        for uid, pod in pods.items():
            ours = HOLD.items() <= pod["metadata"].get("annotations", {}).items()
            new = uid not in self.containers and not pod["metadata"].get("deletionTimestamp")
            if ours and new and pod["status"].get("phase") == "Running" and not self._still_ends(pod):
                self._start(pod)

    def _still_ends(self, pod: Object) -> bool:
        """A kubelet keeps a deleted pod's name until its container has ended; the simulated node frees it at once."""
        earlier = self.container(pod["metadata"]["name"])
        return earlier is not None and earlier.alive

    def _start(self, pod: Object) -> None:
        [container] = pod["spec"]["containers"]
        meta = pod["metadata"]
        job = meta["labels"]["bit/job"]
        work = self.folder / f"{meta['name']}-{meta['uid']}"
        project = work / "etc-bit"
        data = self.core.read_namespaced_config_map(job, meta["namespace"]).data
        work.mkdir(parents=True)
        [items] = [volume["configMap"]["items"] for volume in pod["spec"]["volumes"] if "configMap" in volume]
        for item in items:  # laid out as a kubelet does it: links into ..data, which is a link itself
            path = project / "..1" / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(data[item["key"]])
        (project / "..data").symlink_to("..1")
        for path in (project / "..1").iterdir():
            (project / path.name).symlink_to(Path("..data", path.name))
        shared = self.folder / job / "checkpoints"
        shared.mkdir(parents=True, exist_ok=True)
        (work / ".checkpoints").symlink_to(shared)
        given = {one["name"]: one["value"] if "value" in one else _field(pod, one) for one in container["env"]}
        if endpoint := given.get("PET_RDZV_ENDPOINT"):
            given["PET_RDZV_ENDPOINT"] = f"127.0.0.1:{self.ports.setdefault(endpoint, free_port())}"
            # Names decide in pods: the first hosts the rendezvous, and ranks go by address.
            number = int(meta["labels"]["training.kubeflow.org/replica-index"])
            conf = ",".join(part for part in (given.get("PET_RDZV_CONF"), f"is_host={number == 0}") if part)
            given |= {"PET_RDZV_CONF": conf, "PET_LOCAL_ADDR": f"127.0.0.{1 + number}"}
        environment = os.environ | given
        environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.code),
            "BIT_PROJECT": str(project),
            "BIT_TERMINATION_LOG": str(work / "termination"),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("BIT_METRICS_PORT", None)  # pods of one machine would ask for the same port
        self.containers[meta["uid"]] = Container(pod, work, environment)

    def _tell(self, container: Container, pod: Object) -> None:
        """The container's end in the pod's status; started again where the pod's restartPolicy says so."""
        ended = container.ended()
        again = pod["spec"]["restartPolicy"] == "Always" or (
            pod["spec"]["restartPolicy"] == "OnFailure" and ended["exitCode"] != 0
        )
        [told] = pod["status"]["containerStatuses"]
        if again:
            container.restart()
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            state = {"running": {"startedAt": now}, "terminated": None}
            told |= {"restartCount": container.restarts, "state": state, "lastState": {"terminated": ended}}
            status = {"containerStatuses": [told]}
        else:
            told |= {"ready": False, "state": {"terminated": ended, "running": None}}
            status = {"phase": "Succeeded" if ended["exitCode"] == 0 else "Failed", "containerStatuses": [told]}
        self.core.patch_namespaced_pod_status(container.name, container.namespace, {"status": status})
        container.told = not again


def _field(pod: Object, variable: Object) -> str:
    """The value of an environment variable that the downward API gives."""
    value: Any = pod
    path, _, key = variable["valueFrom"]["fieldRef"]["fieldPath"].partition("['")
    for part in path.split("."):
        value = value[part]
    return str(value[key.removesuffix("']")] if key else value)
