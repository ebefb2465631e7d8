"""A rolling update under load, by processes of the service with the rendered chart's own timings: no request fails.

The test plays what a cluster does around a pod. Deployment: one new pod must be ready, then an old one goes. kubelet: preStop,
SIGTERM, SIGKILL after the grace period. kube-proxy: learns of a leaving pod late, by nearly the whole preStop, and moves no
connection that stands.
"""

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from benchmarks import load
from tests.charts.helm import environment, pod_of, render
from tests.services.exports import export, gray_png
from training.demo.walk import free_port
from training.serve import process

pytestmark = pytest.mark.heavy
ASK = load.request("/v1/lamps/classify", gray_png(200))


@dataclass
class Pod:
    port: int
    running: subprocess.Popen[bytes]


@dataclass
class Rollout:
    """pod: the rendered spec; folder: the models and caches; endpoints: where the Service leads new connections."""

    pod: dict[str, Any]
    folder: Path
    endpoints: list[Pod] = field(default_factory=list)

    @contextmanager
    def started(self) -> Iterator[Pod]:
        """The container's process with its environment; the addresses and folders are this machine's."""
        port, given = free_port(), environment(self.pod)
        own = {"BIT_SERVE_HOST": "127.0.0.1", "BIT_SERVE_PORT": str(port), "BIT_SERVE_WORKERS": "1"}
        own["BIT_SERVE_CACHE_DIR"] = str(self.folder / f"cache-{port}")
        command = [sys.executable, "-m", "services.inference.app"]
        with process("bit-serve", command, self.folder / f"{port}.log", {**given, **own}, may_end=True) as running:
            yield Pod(port, running)

    async def until_ready(self, pod: Pod) -> None:
        """As often as the readiness probe asks, up to the 60 s that the startup probe gives."""
        probe = self.pod["containers"][0]["readinessProbe"]
        url = f"http://127.0.0.1:{pod.port}{probe['httpGet']['path']}"
        async with httpx.AsyncClient(timeout=probe["timeoutSeconds"]) as http:
            for _ in range(60 // probe["periodSeconds"]):
                await asyncio.sleep(probe["periodSeconds"])
                with suppress(httpx.HTTPError):
                    if (await http.get(url)).status_code == 200:
                        self.endpoints.append(pod)
                        return
        raise AssertionError((self.folder / f"{pod.port}.log").read_text())

    async def deleted(self, pod: Pod) -> float:
        """Seconds until the pod's process ended by itself within its grace period."""
        began, pre_stop = monotonic(), self.pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
        await asyncio.sleep(0.8 * pre_stop)
        self.endpoints.remove(pod)
        await asyncio.sleep(0.2 * pre_stop)
        pod.running.send_signal(signal.SIGTERM)
        left = self.pod["terminationGracePeriodSeconds"] - pre_stop
        status = await asyncio.to_thread(pod.running.wait, left)  # TimeoutExpired: the kubelet would have killed it
        assert status in (0, -signal.SIGTERM)  # uvicorn passes the signal on when all is answered; as process 1 it is 0
        return monotonic() - began


async def customers(rollout: Rollout, said: Counter[int | str], kept: bool, stop: asyncio.Event) -> None:
    """One after another, over a connection that is kept until the service closes it, or a new one each time."""
    endpoint, connection = cycle(range(1_000)), None
    while not stop.is_set():
        try:
            if connection is None or connection.transport.is_closing():
                pod = rollout.endpoints[next(endpoint) % len(rollout.endpoints)]
                connection = await load.connect(f"http://127.0.0.1:{pod.port}")
            said[(await connection.ask(ASK))[0]] += 1
        except OSError as error:
            said[repr(error)] += 1
            connection = None
        if connection is not None and not kept:
            connection.transport.close()
        await asyncio.sleep(0.01)
    if connection is not None:
        connection.transport.close()


async def upgrade(rollout: Rollout, old: list[Pod], new: list[Pod]) -> Counter[int | str]:
    """Replaces each old pod by a new one, as maxSurge 1 and maxUnavailable 0 have it; what the customers were told."""
    for pod in old:
        await rollout.until_ready(pod)
    said: Counter[int | str] = Counter()
    stop = asyncio.Event()
    asking = [asyncio.create_task(customers(rollout, said, number % 2 == 0, stop)) for number in range(8)]
    leaving = []
    for before, after in zip(old, new, strict=True):
        await rollout.until_ready(after)
        leaving.append(asyncio.create_task(rollout.deleted(before)))
    for seconds in await asyncio.gather(*leaving):
        assert seconds >= rollout.pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    stop.set()
    await asyncio.gather(*asking)
    await asyncio.sleep(0.1)  # closed transports end in the loop's next turn
    return said


def test_an_upgrade_under_load_loses_no_request(tmp_path: Path) -> None:
    (tmp_path / "lamps.onnx").write_bytes(export(mflop=200))
    objects = render("inference", models__path=str(tmp_path), settings__poll_interval_s=0.3)
    assert objects["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    rollout = Rollout(pod_of(objects["Deployment"]), tmp_path)
    with ExitStack() as stack:
        old = [stack.enter_context(rollout.started()) for _ in range(2)]
        new = [stack.enter_context(rollout.started()) for _ in range(2)]
        said = asyncio.run(upgrade(rollout, old, new))
    assert set(said) == {200}, said
    assert said[200] > 300


def test_without_pre_stop_and_drain_it_would(tmp_path: Path) -> None:
    """The yardstick: processes that end at once break requests that come to them late."""
    (tmp_path / "lamps.onnx").write_bytes(export(mflop=200))
    objects = render("inference", models__path=str(tmp_path))
    rollout = Rollout(pod_of(objects["Deployment"]), tmp_path)
    container = rollout.pod["containers"][0]
    next(one for one in container["env"] if one["name"] == "BIT_SERVE_DRAIN_S")["value"] = "0"

    async def cut(old: Pod, new: Pod) -> Counter[int | str]:
        await rollout.until_ready(old)
        await rollout.until_ready(new)
        said: Counter[int | str] = Counter()
        stop = asyncio.Event()
        asking = [asyncio.create_task(customers(rollout, said, number % 2 == 0, stop)) for number in range(8)]
        await asyncio.sleep(1)
        old.running.send_signal(signal.SIGTERM)  # at once, while kube-proxy still sends customers there
        await asyncio.to_thread(old.running.wait, 30)
        await asyncio.sleep(1)
        rollout.endpoints.remove(old)
        stop.set()
        await asyncio.gather(*asking)
        await asyncio.sleep(0.1)
        return said

    with ExitStack() as stack:
        pods = [stack.enter_context(rollout.started()) for _ in range(2)]
        said = asyncio.run(cut(*pods))
    assert set(said) - {200}
