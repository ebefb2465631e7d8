"""Every query of the dashboard against a real Prometheus that scrapes a real service; and the gauge that scaling asks."""

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from charts.dashboard import dashboard
from tests.operations.prometheus import Prometheus, Sample, prometheus
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve
from training.data.dataset import Dataset
from training.demo.walk import free_port
from training.serve import process

FILE = Path(__file__).parents[2] / "charts/inference/files/dashboard.json"
LABELS = {"namespace": "shop", "job": "bit-serve", "pod": "pod-0"}
PANELS: list[dict[str, Any]] = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
QUERIES = {f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]}
SERVICE = {name: query for name, query in QUERIES.items() if "bit_training" not in query}
TRAINING = {name: query for name, query in QUERIES.items() if name not in SERVICE}


def asked(query: str) -> str:
    """The query as Grafana sends it with all of every variable chosen."""
    query = re.sub(r"\$(namespace|job|tenant)\b", ".*", query).replace("$__rate_interval", "10s")
    assert "$" not in query, query
    return query


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Prometheus]]:
    """A service with two tenants, a challenger, a swap and a refused version, that Prometheus scrapes every second."""
    folder = tmp_path_factory.mktemp("watched")
    store = Folder(folder)
    store.publish("lamps", export())
    store.publish("movers", export())
    with bit_serve(store, folder) as service:
        target = {
            "targets": [service.url.removeprefix("http://")],
            "labels": {k: v for k, v in LABELS.items() if k != "job"},
        }
        scrape = {"job_name": "bit-serve", "static_configs": [target]}
        with prometheus(folder, [scrape]) as watching:
            yield service, watching


def test_the_committed_dashboard_is_the_one_that_its_table_makes() -> None:
    assert json.loads(FILE.read_text()) == dashboard(), (
        "python -m charts.dashboard > charts/inference/files/dashboard.json"
    )


def test_panels_neither_overlap_nor_share_a_number() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_every_query_about_the_service_returns_data(watched: tuple[Service, Prometheus]) -> None:
    service, watching = watched
    stop = threading.Event()

    def customers() -> None:
        while not stop.wait(0.05):
            for tenant in ("lamps", "movers", "nobody"):
                service.classify(tenant, gray_png(10))

    asking = threading.Thread(target=customers)
    asking.start()
    try:
        for swaps, sign in enumerate((-1, 1), start=1):  # Prometheus must see the counters before and after
            watching.wait(
                'bit_swaps_total{tenant="lamps"}', lambda found, n=swaps: bool(found) and found[0][1] == n, 20
            )
            service.wait_until("lamps", service.store.publish("lamps", export(sign=sign, threshold=0.1 * swaps)))
        service.store.publish("movers", export(golden_off=0.5))
        empty = set(SERVICE)
        end = time.monotonic() + 30
        while empty and time.monotonic() < end:
            empty = {name for name in empty if not usable(watching, SERVICE[name])}
            time.sleep(0.5)
        assert not empty, {name: asked(SERVICE[name]) for name in empty}
    finally:
        stop.set()
        asking.join()


def test_every_query_about_a_training_returns_data_of_a_real_one(dataset: Dataset, tmp_path: Path) -> None:
    """Two trainings at once, upstream and a tenant's, each on its own port as in its own pod; they end when all is seen."""
    scrapes = []
    with ExitStack() as stack:
        for name in ("upstream", "cats-transfer"):
            port = free_port()
            command = [sys.executable, "-m", "tests.training.engine.small_training"]
            command += [dataset.url, str(tmp_path / f"{name}.npz"), "100000", name]
            given = {"BIT_METRICS_PORT": str(port), "BIT_CHECKPOINTS": str(tmp_path / "checkpoints")}
            stack.enter_context(process(name, command, tmp_path / f"{name}.log", given))
            target = {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "train", "pod": f"{name}-0"}}
            scrapes.append({"job_name": name, "static_configs": [target]})
        watching = stack.enter_context(prometheus(tmp_path, scrapes))
        for query in TRAINING.values():
            watching.wait(asked(query), both, 90)


def both(found: list[Sample]) -> bool:
    """Whether the answer has a number for the upstream training and for the tenant's."""
    seen = {(where["stage"], where.get("tenant", "")) for where, value in found if value == value}
    return seen == {("pretrain", ""), ("finetune", "cats")}


def usable(watching: Prometheus, query: str) -> bool:
    """Whether the answer has a series with a number (0 / 0 is none)."""
    return any(value == value for _, value in watching.ask(asked(query)))


def test_the_figures_are_those_of_the_requests(watched: tuple[Service, Prometheus]) -> None:
    service, watching = watched
    counted = 'sum(bit_requests_total{tenant="movers",status="200"})'
    for _ in range(20):
        assert service.classify("movers", gray_png(10)).status_code == 200
    told = service.http.get("/metrics").text.splitlines()
    mine = [line for line in told if line.startswith('bit_requests_total{status="200",tenant="movers"')]
    all_of_them = sum(float(line.split()[1]) for line in mine)
    assert all_of_them >= 20
    watching.wait(counted, lambda found: bool(found) and found[0][1] == all_of_them, 20)


def test_the_queue_is_empty_again_after_the_last_request(tmp_path: Path) -> None:
    """A gauge that is set at arrivals alone keeps its last value, and pods would never be taken away."""
    store = Folder(tmp_path)
    store.publish("lamps", export(mflop=2_000))
    with bit_serve(store, tmp_path, "--workers", "1") as service:
        asking = [threading.Thread(target=service.classify, args=("lamps", gray_png(10))) for _ in range(30)]
        for thread in asking:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in asking):
            longest = max(longest, gauge(service, "bit_queue_seconds"))
        assert longest > 0.02
        assert gauge(service, "bit_queue_seconds") == 0
        assert gauge(service, "bit_in_flight_requests") == 0
        assert gauge(service, "bit_workers") == 1
        assert gauge(service, "bit_busy_seconds_total") > longest / 2


def gauge(service: Service, name: str) -> float:
    [line] = [one for one in service.http.get("/metrics").text.splitlines() if one.startswith(f"{name} ")]
    return float(line.split()[1])
