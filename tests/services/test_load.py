"""Under load: fairness, overload, swaps, a rolling restart, and clients that misbehave. One busy network, real processes."""

import asyncio
import itertools
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks import load
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve
from tests.services.test_wire import connections, large_answer

pytestmark = pytest.mark.heavy
BUSY_MFLOP = 2_500  # per picture: more than 10 ms, so that the load's own generator hardly counts
ASK = load.request("/v1/lamps/classify", gray_png(10))


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("busy")
    store = Folder(folder)
    for tenant in ("lamps", "hog", "other"):
        store.publish(tenant, export(mflop=BUSY_MFLOP))
    with bit_serve(store, folder, "--max_queue_ms", "1000") as service:
        yield service


def measure_capacity(busy: Service) -> float:
    """Good answers per second with sixteen connections that never pause."""
    return asyncio.run(load.closed(busy.url, ASK, 16, 2)).rate


def test_a_tenant_that_sends_ten_times_its_share_does_not_slow_the_others(busy: Service) -> None:
    """Each sends 80 % of a third of the machine; then one of them ten times that. Rounds of both in turn, with capacity measured
    anew for each; the best of either counts, since what else the machine does can only slow it. More rounds where it did.
    """
    asks = {tenant: load.request(f"/v1/{tenant}/classify", gray_png(10)) for tenant in ("lamps", "other", "hog")}

    async def crowd(capacity: float, hogs_share: float) -> load.Result:
        share = 0.8 * capacity / 3
        rates = {tenant: share * (hogs_share if tenant == "hog" else 1) for tenant in asks}
        sent = [
            load.arriving(busy.url, asks[tenant], rates[tenant], 4, deadline_s=9, seed=n)
            for n, tenant in enumerate(asks)
        ]
        lamps, other, _ = await asyncio.gather(*sent)
        lamps.seconds += other.seconds
        lamps.statuses += other.statuses
        return lamps

    fair_ms, unfair_ms = [9e9], [9e9]
    for number in range(9):
        capacity = measure_capacity(busy)
        asyncio.run(crowd(capacity, 1))  # what the measurement of capacity used is forgotten by then
        fair, unfair = asyncio.run(crowd(capacity, 1)), asyncio.run(crowd(capacity, 10))
        print(f"p99 {fair.percentile_ms(99):.1f} → {unfair.percentile_ms(99):.1f} ms, {unfair.statuses}")
        fair_ms.append(fair.percentile_ms(99))
        if set(unfair.statuses) == {200}:  # else the machine had less than it was measured to have
            unfair_ms.append(unfair.percentile_ms(99))
        if number >= 1 and min(unfair_ms) <= 1.5 * min(fair_ms):
            break
    assert min(unfair_ms) <= 1.5 * min(fair_ms)


@pytest.mark.parametrize(("retries", "least"), [({"back_off": True, "tries": 99}, 0.85), ({"tries": 6}, 0.7)])
def test_twice_the_load_leaves_the_goodput(busy: Service, retries: dict, least: float) -> None:
    """Customers that wait as Retry-After says, and a storm of customers that try six times within 50 ms. Capacity is measured
    before and after, and the best of four rounds counts: what else the machine does can only lower it.
    """
    shares: list[float] = []
    while not shares or (max(shares) < least and len(shares) < 4):
        before = measure_capacity(busy)
        result = asyncio.run(load.arriving(busy.url, ASK, 2 * before, 6, deadline_s=4, **retries))
        time.sleep(1)  # what still waits is over by then
        shares.append(result.rate / ((before + measure_capacity(busy)) / 2))
        print(f"goodput {shares[-1]:.2f} of capacity, {result.statuses}")
        assert set(result.statuses) <= {200, 503}
    assert max(shares) >= least


def test_no_request_fails_or_waits_while_versions_are_swapped(tmp_path: Path) -> None:
    """Swaps under load: no error, no longer wait for one in a hundred (the best of three rounds: what else the machine does can
    only slow it), and memory stays what it was. `make bench-swaps` does a thousand.
    """
    store = Folder(tmp_path)
    store.publish("lamps", export(mflop=5))
    numbers = itertools.count()
    with bit_serve(store, tmp_path, "--poll_interval_s", "0.02") as service, ThreadPoolExecutor(2) as pool:

        def p99_ms(meanwhile: Callable[[], object]) -> float:
            stop = threading.Event()

            def ask() -> list[float]:
                took = []
                with httpx.Client(base_url=service.url) as client:
                    while not stop.is_set():
                        began = time.perf_counter()
                        assert client.post("/v1/lamps/classify", content=gray_png(10)).status_code == 200
                        took.append(time.perf_counter() - began)
                return took

            asking = [pool.submit(ask) for _ in range(2)]
            try:
                meanwhile()
            finally:
                stop.set()
            took = sorted(seconds for one in asking for seconds in one.result())
            assert len(took) > 100
            return took[int(len(took) * 0.99)] * 1000

        def swap_often() -> None:
            for number in itertools.islice(numbers, 20):
                data = export(mflop=5, sign=(-1) ** number, threshold=number / 100)
                service.wait_until("lamps", store.publish("lamps", data))

        rounds, sizes_kb = [], []
        while not rounds or (min(rounds) > 2 and len(rounds) < 3):
            quiet_ms, swapped_ms = p99_ms(lambda: time.sleep(2)), p99_ms(swap_often)
            print(f"p99 {quiet_ms:.1f} → {swapped_ms:.1f} ms")
            rounds.append(swapped_ms / (quiet_ms + 5))
            sizes_kb.append(resident_kb(service.process))
        assert min(rounds) <= 2
        p99_ms(swap_often)
        assert resident_kb(service.process) <= 1.1 * sizes_kb[0] + 10_000


class Balancer:
    """A load balancer that follows readiness: each connection goes to an instance that said it was ready just now."""

    def __init__(self) -> None:
        self.ready: dict[int, bool] = {}
        self.turn = 0

    async def watch(self, port: int) -> None:
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    answer = await client.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5)
                    self.ready[port] = answer.status_code == 200
                except httpx.HTTPError:
                    self.ready[port] = False
                await asyncio.sleep(0.1)

    async def saw_ready(self, *ports: int) -> None:
        while not all(self.ready.get(port) for port in ports):
            await asyncio.sleep(0.05)

    async def pick(self) -> int:
        while not (ready := [port for port, is_ready in sorted(self.ready.items()) if is_ready]):
            await asyncio.sleep(0.05)
        self.turn += 1
        return ready[self.turn % len(ready)]


def test_a_rolling_restart_loses_no_request(tmp_path: Path) -> None:
    """Two instances behind a balancer; each gets SIGTERM under load, in turn."""
    store = Folder(tmp_path)
    store.publish("lamps", export(mflop=50))

    async def roll(services: list[Service]) -> tuple[list[object], list[int]]:
        balancer, answers, stop = Balancer(), [], asyncio.Event()
        ports = [int(service.url.rsplit(":", 1)[1]) for service in services]
        watches = [asyncio.create_task(balancer.watch(port)) for port in ports]
        await balancer.saw_ready(*ports)

        async def customer() -> None:
            while not stop.is_set():
                try:
                    connection = await load.connect(f"http://127.0.0.1:{await balancer.pick()}")
                    answers.append((await connection.ask(ASK))[0])
                    connection.transport.close()
                except OSError as error:
                    answers.append(repr(error))

        async def more_answers() -> None:
            wanted = len(answers) + 50
            while len(answers) < wanted:
                await asyncio.sleep(0.05)

        customers = [asyncio.create_task(customer()) for _ in range(8)]
        await more_answers()
        services[0].process.send_signal(signal.SIGTERM)
        first = await asyncio.to_thread(services[0].process.wait, 60)
        replacement = await asyncio.to_thread(stack.enter_context, bit_serve(store, tmp_path, *flags))
        port = int(replacement.url.rsplit(":", 1)[1])
        watches.append(asyncio.create_task(balancer.watch(port)))
        await balancer.saw_ready(port)
        await more_answers()
        services[1].process.send_signal(signal.SIGTERM)
        second = await asyncio.to_thread(services[1].process.wait, 60)
        await more_answers()
        stop.set()
        await asyncio.gather(*customers)
        for watch in watches:
            watch.cancel()
        return answers, [first, second]

    flags = ("--drain_s", "4", "--grace_s", "20")  # more than the balancer needs to see it, also on a busy machine
    with ExitStack() as stack:
        services = [stack.enter_context(bit_serve(store, tmp_path, *flags, stopped_by_test=True)) for _ in range(2)]
        answers, ends = asyncio.run(roll(services))
    assert len(answers) > 100
    assert set(answers) == {200}
    assert set(ends) <= {0, -signal.SIGTERM, 128 + signal.SIGTERM}


def test_after_sigterm_running_requests_end_and_the_process_leaves_within_its_grace(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.publish("lamps", export(mflop=20_000))
    flags = ("--grace_s", "60", "--max_batch", "1")
    with bit_serve(store, tmp_path, *flags, stopped_by_test=True) as service, ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(service.classify, "lamps", gray_png(10)) for _ in range(4)]
        end = time.monotonic() + 20
        while in_flight(service) < 4:
            assert time.monotonic() < end
        service.process.send_signal(signal.SIGTERM)
        assert [one.result().status_code for one in asking] == [200] * 4
        service.process.wait(60)
        with pytest.raises(httpx.ConnectError):
            service.classify("lamps", gray_png(10))


def in_flight(service: Service) -> float:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("bit_in_flight_requests ")).split()[1])


def test_misbehaving_clients_do_not_touch_the_others(tmp_path: Path) -> None:
    """Connections that say nothing, half a header or a giant one, a body that never ends or never comes, garbage; that do not
    read their answers, or keep the connection by a byte now and then. Meanwhile others are answered as quickly as before.
    """
    store = Folder(tmp_path)
    store.publish("lamps", export())
    limits = [f"--{what}_timeout_s=3" for what in ("header", "body", "answer")] + ["--max_body_bytes", "1000000"]
    with bit_serve(store, tmp_path, *limits) as service:
        address = service.url.removeprefix("http://").split(":")[0], int(service.url.rsplit(":", 1)[1])

        before_kb, quick_ms, before = resident_kb(service.process), median_ms(service), connections(service)

        def opened(data: bytes = b"") -> socket.socket:
            connection = socket.create_connection(address, timeout=30)
            connection.sendall(data)
            return connection

        silent = [opened() for _ in range(50)]
        half = [opened(b"POST /v1/lamps/classify HTTP/1.1\r\nhost:") for _ in range(50)]
        no_body = opened(b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nabc")
        endless = opened(b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        garbage = opened(b"\x16\x03\x01\x02\x00 not HTTP at all\r\n\r\n")
        for _ in range(20):
            endless.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        giants = [opened(b"GET /v2 HTTP/1.1\r\nx: " + b"y" * 250_000) for _ in range(50)]
        for giant in giants:
            giant.sendall(b"y" * 250_000)
        playground = b"GET /static/playground.js HTTP/1.1\r\nhost: x\r\n\r\n"
        readers = [opened(large_answer() * 15) for _ in range(20)]
        keepers = [opened(playground) for _ in range(50)]
        for keeper in keepers:
            keeper.recv(100)
            keeper.sendall(b"\r\n")
        slow_ms, grown_kb = median_ms(service), resident_kb(service.process) - before_kb
        print(f"median {quick_ms:.2f} → {slow_ms:.2f} ms, memory + {grown_kb / 1024:.0f} MB")
        assert slow_ms <= 2 * quick_ms + 2
        assert grown_kb < 100 * 1024
        assert endless.recv(100).split()[1] == b"413"
        assert garbage.recv(100).split()[1] == b"400"
        assert service.classify("lamps", gray_png(10)).status_code == 200
        assert no_body.recv(100).split()[1] == b"408"
        assert {giant.recv(100).split()[1] for giant in giants} == {b"431"}
        for connection in (*silent, *half):
            assert connection.recv(10) == b"", "closed by the service"
        end = time.monotonic() + 20
        while connections(service) > before:
            assert time.monotonic() < end, "all of them are closed"
            time.sleep(0.1)
        for connection in (*silent, *half, *giants, *readers, *keepers, no_body, endless, garbage):
            connection.close()


def test_ten_thousand_idle_connections_do_not_slow_a_request(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert hard > 11_000, f"this machine allows {hard} open files; the test needs 11,000"
    store = Folder(tmp_path)
    store.publish("lamps", export())
    with bit_serve(store, tmp_path, "--header_timeout_s", "60") as service:
        address = "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        before_kb, quick = resident_kb(service.process), median_ms(service)
        idle = [socket.create_connection(address, timeout=60) for _ in range(10_000)]
        slow, grown_kb = median_ms(service), resident_kb(service.process) - before_kb
        for connection in idle:
            connection.close()
        print(f"median {quick:.2f} → {slow:.2f} ms, memory + {grown_kb / 1024:.0f} MB")
        assert slow <= 2 * quick + 2
        assert grown_kb < 200 * 1024
        assert service.classify("lamps", gray_png(10)).status_code == 200


def median_ms(service: Service) -> float:
    """Of a hundred requests, the best of five times: what else the machine does can only slow them."""
    medians = []
    for _ in range(5):
        took = []
        for _ in range(100):
            began = time.perf_counter()
            assert service.classify("lamps", gray_png(10)).status_code == 200
            took.append(time.perf_counter() - began)
        medians.append(sorted(took)[50] * 1000)
    return min(medians)


def resident_kb(process: "subprocess.Popen[bytes]") -> int:
    return int(Path(f"/proc/{process.pid}/status").read_text().split("VmRSS:")[1].split()[0])
