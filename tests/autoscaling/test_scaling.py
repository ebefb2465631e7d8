"""Load → gauges → Prometheus → the chart's own query → the replicas that the load warrants; then KEDA and the HPA act on it.

The load is a number of connections that never pause, so that what is in flight is known: as many requests as connections.
"""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import load
from tests import clusters
from tests.autoscaling import chart
from tests.operations.prometheus import Prometheus, Sample, prometheus
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve

pytestmark = pytest.mark.heavy
RELEASE, NAMESPACE, TARGET = "shop", "bit", 4
VALUES = (
    "image.repository=example.test/bit-inference",
    "autoscaling.by=keda",
    "autoscaling.minReplicas=1",
    "autoscaling.maxReplicas=6",
    f"autoscaling.keda.inFlight={TARGET}",
    "autoscaling.keda.queueMilliseconds=100000",  # what is in flight decides: the machine's speed must not
    "metrics.monitor=service",
    "metrics.interval=2s",
    "metrics.rules.enabled=true",
)
ASK = load.request("/v1/lamps/classify", gray_png(10))
RISES_WITHIN_S, WINDOW_S = 30, 30  # the query averages over 30 s


class Customers:
    """Connections that never pause; their number can be changed."""

    def __init__(self, url: str) -> None:
        self.url, self.wanted, self.statuses = url, 0, set[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @contextmanager
    def asking(self) -> Iterator["Customers"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    async def _run(self) -> None:
        running: set[asyncio.Task[None]] = set()
        while not self._stop.is_set():
            running = {task for task in running if not task.done()}
            for number in range(len(running), self.wanted):
                running.add(asyncio.create_task(self._one(number)))
            await asyncio.sleep(0.05)
        self.wanted = 0
        await asyncio.gather(*running)

    async def _one(self, number: int) -> None:
        connection = await load.connect(self.url)
        while number < self.wanted:
            status, _ = await connection.ask(ASK)
            self.statuses.add(status)
        connection.transport.close()


@pytest.fixture(scope="module")
def objects() -> chart.Objects:
    return chart.render(chart.unpacked(), RELEASE, NAMESPACE, *VALUES)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("serving")
    store = Folder(folder)
    store.publish("lamps", export(mflop=2_500))
    with bit_serve(store, folder, "--max_queue_ms", "60000", "--workers", "1") as running:
        yield running


@pytest.fixture(scope="module")
def watching(
    service: Service, objects: chart.Objects, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus with the scrape settings and rules of the rendered chart."""
    folder = tmp_path_factory.mktemp("watching")
    scrape = chart.scrape(objects, NAMESPACE, service.url.removeprefix("http://"))
    with prometheus(folder, [scrape], chart.rules(objects, folder / "rules.yaml")) as running:
        running.wait(f'up{{namespace="{NAMESPACE}"}}', lambda found: bool(found) and found[0][1] == 1, 30)
        yield running


def test_the_query_gives_the_replicas_that_the_load_warrants(
    service: Service, objects: chart.Objects, watching: Prometheus
) -> None:
    """Three levels: 3, 12 and 24 requests in flight at 4 a replica are 1, 3 and 6 replicas.

    All are further from fewer replicas than the 10 % that the HPA tolerates.
    """
    asked = chart.triggers(objects)
    query, target = asked["in-flight"]
    assert target == TARGET

    def replicas(found: list[Sample]) -> int:
        return math.ceil(found[0][1] / target)

    with Customers(service.url).asking() as customers:
        for connections, warranted in ((3, 1), (12, 3), (24, 6)):
            customers.wanted = connections
            took = watching.wait(query, lambda found, n=warranted: replicas(found) == n, RISES_WITHIN_S + WINDOW_S)
            print(f"{connections} in flight: {warranted} replicas after {took:.1f} s")
            assert warranted == 1 or took <= RISES_WITHIN_S
        queue, _ = asked["queue"]
        assert watching.ask(queue)[0][1] > 0, "most of 24 requests wait for one worker"
        customers.wanted = 0
        fell = watching.wait(query, lambda found: found[0][1] == 0, 3 * WINDOW_S)
        print(f"no load: no replica wanted after {fell:.1f} s")
        assert fell >= WINDOW_S / 2, "the average holds on to the load for its window"
    assert customers.statuses == {200}
    watching.wait(queue, lambda found: found[0][1] == 0, WINDOW_S)
    recorded = watching.ask(
        f'bit:requests:rate5m{{namespace="{NAMESPACE}",job="{objects["Service"]["metadata"]["name"]}"}}'
    )
    assert recorded, "the chart's rules are loaded and see the release"


def test_keda_and_the_hpa_scale_the_charts_deployment_up_and_down(
    service: Service, watching: Prometheus, tmp_path: Path
) -> None:
    with clusters.running(tmp_path / "cluster", "keda,kwok") as cluster:
        cluster.kubectl("create", "namespace", NAMESPACE)
        values = (*VALUES, f"autoscaling.keda.prometheus={watching.url}", "autoscaling.keda.pollingInterval=2")
        values += ("autoscaling.down.windowSeconds=10", "autoscaling.down.pods=4", "autoscaling.down.periodSeconds=15")
        values += (
            "metrics.monitor=none",
            "metrics.rules.enabled=false",
        )  # the operator's types are not in this cluster
        settings = [part for value in values for part in ("--set", value)]
        cluster.helm("install", RELEASE, str(chart.CHART), "--namespace", NAMESPACE, *settings)
        name = f"{RELEASE}-inference"

        def ready() -> int:
            found = cluster.get("deployment", name, "--namespace", NAMESPACE)
            return int(found["status"].get("readyReplicas", 0))

        def state() -> str:
            return cluster.kubectl("get", "hpa,scaledobject,pods", "--namespace", NAMESPACE)

        with Customers(service.url).asking() as customers:
            for connections, warranted in ((3, 1), (12, 3), (24, 6), (0, 1)):
                customers.wanted = connections
                began = time.monotonic()
                try:
                    clusters.wait_for(lambda n=warranted: ready() == n, 120)
                except AssertionError as error:
                    raise AssertionError(state()) from error
                print(f"{connections} in flight: {warranted} replicas after {time.monotonic() - began:.0f} s")
