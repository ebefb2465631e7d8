"""One connection, by raw sockets: what clients do to it, by accident or by design, and what the service answers."""

import asyncio
import contextlib
import gc
import json
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn

from services.inference import wire
from services.inference.deadline import Deadline
from services.inference.http1 import rendered
from services.inference.pages import Pages, pages
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve

LIMIT_S = 1.0
PICTURE = gray_png(250)
ASK = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(PICTURE) + PICTURE


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Gives clients one second for everything."""
    folder = tmp_path_factory.mktemp("strict")
    store = Folder(folder)
    store.publish("lamps", export())
    limits = [f"--{what}_timeout_s={LIMIT_S}" for what in ("header", "body", "answer")]
    with bit_serve(store, folder, *limits, "--max_body_bytes", "1000000") as service:
        yield service


Dial = Callable[..., socket.socket]


@pytest.fixture
def dial(strict: Service) -> Iterator[Dial]:
    """dial(data) → a connection on which that was sent."""
    with ExitStack() as stack:

        def opened(data: bytes = b"") -> socket.socket:
            address = "127.0.0.1", int(strict.url.rsplit(":", 1)[1])
            connection = stack.enter_context(socket.create_connection(address, timeout=15))
            connection.sendall(data)
            return connection

        yield opened


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(1_000_000):
        parts.append(part)
    return b"".join(parts)


def answer_of(connection: socket.socket) -> tuple[int, dict]:
    """The next answer's status and JSON."""

    def more() -> bytes:
        part = connection.recv(1_000_000)
        assert part, "closed before the answer was whole"
        return part

    said = more()
    while b"\r\n\r\n" not in said:
        said += more()
    head, _, body = said.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += more()
    return int(head.split()[1]), json.loads(body[:length])


def wait_for_end(connection: socket.socket) -> float:
    """Seconds until the service ends the connection, which it must."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        assert connection.recv(1) == b""
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        ((b"GET /v2 HTTP/1.1\r\nx: ", *[b"y" * 65_536] * 20), b""),
        ((b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 70_000,), b"\r\n\r\n"),
        ((b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200,), b"\r\n"),
    ],
    ids=["endless", "long", "many"],
)
def test_a_header_has_a_largest_size(dial: Dial, sent: tuple[bytes, ...], end: bytes) -> None:
    connection = dial()
    for part in (*sent, end):
        connection.sendall(part)
        time.sleep(0.01)
    status, told = answer_of(connection)
    assert (status, told["error"]) == (431, "a request's header holds at most 65,536 bytes and 100 lines")
    assert wait_for_end(connection) < LIMIT_S + 3


def test_trailers_have_a_largest_size_and_are_no_headers(dial: Dial) -> None:
    head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"%x\r\n" % len(PICTURE) + PICTURE + b"\r\n0\r\n"
    connection = dial(head + chunks + b"x-trailer: 1\r\n\r\n")
    assert answer_of(connection)[0] == 200
    connection.sendall(head + chunks)
    for _ in range(20):
        connection.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
        time.sleep(0.005)
    assert answer_of(connection)[0] == 431


@pytest.mark.parametrize("trick", [b"\r\n", b"x"])
def test_a_connection_that_was_answered_does_not_stay_by_a_byte(dial: Dial, trick: bytes) -> None:
    refused = b"POST /v1/nobody/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n"
    connection = dial(ASK if trick == b"\r\n" else refused)
    assert answer_of(connection)[0] == (200 if trick == b"\r\n" else 404)
    time.sleep(0.1)
    connection.sendall(trick)
    assert wait_for_end(connection) < LIMIT_S + 3


def test_a_small_body_that_was_refused_leaves_the_connection(dial: Dial) -> None:
    head = b"POST /v1/nobody/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n"
    connection = dial(head)
    assert answer_of(connection)[0] == 404
    connection.sendall(bytes(60_000) + ASK)
    assert answer_of(connection)[0] == 200


@pytest.mark.parametrize("body", ["whole", "apart", "chunked"])
def test_an_offer_to_upgrade_is_ignored_and_the_body_read(dial: Dial, body: str) -> None:
    """As Java's HttpClient sends every first request. Lost, the body would be read as the next request."""
    offer = (
        b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA\r\n"
    )
    if body == "chunked":
        length, data = b"transfer-encoding: chunked", b"%x\r\n" % len(PICTURE) + PICTURE + b"\r\n0\r\n\r\n"
    else:
        length, data = b"content-length: %d" % len(PICTURE), PICTURE
    head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\n" + offer + length + b"\r\n\r\n"
    connection = dial()
    for part in (head, data) if body == "apart" else (head + data,):
        connection.sendall(part)
        time.sleep(0.1)
    status, told = answer_of(connection)
    assert (status, told["predictions"][0]["class"]) == (200, "bright")
    connection.sendall(ASK)
    assert answer_of(connection)[0] == 200


def large_answer() -> bytes:
    """A request whose answer is a megabyte."""
    data = bytes(range(256)) * 192
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [64, 16, 16, 3]}
    tensor |= {"parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [tensor], "outputs": [{"name": "feature_map"}]}).encode()
    head = b"POST /v2/models/lamps/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: %d\r\n" % len(text)
    return head + b"content-length: %d\r\n\r\n" % (len(text) + len(data)) + text + data


def test_who_does_not_read_is_cut_off(dial: Dial, strict: Service) -> None:
    """Fifteen answers of a megabyte on each connection: more than the system's buffers hold."""
    ask = large_answer()
    assert answer_of(dial(ask))[0] == 200
    before = connections(strict)
    slow = [dial(ask * 15) for _ in range(4)]
    end = time.monotonic() + LIMIT_S + 10
    for number in (before + len(slow), before):
        while connections(strict) != number:
            assert time.monotonic() < end
            time.sleep(0.02)
    assert strict.classify("lamps", PICTURE).status_code == 200


def connections(service: Service) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def test_garbage_is_refused_in_the_apis_own_form_after_what_came_before_it(dial: Dial) -> None:
    status, told = answer_of(dial(b"\x16\x03\x01\x02\x00 not HTTP\r\n\r\n"))
    assert (status, "not HTTP/1.1" in told["error"]) == (400, True)
    said = read_to_end(dial(ASK + b"\x16\x03\x01 garbage\r\n\r\n"))
    assert said.startswith(b"HTTP/1.1 200")
    assert said.count(b"HTTP/1.1") == 1
    said = read_to_end(dial(b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n"))
    assert said.startswith(b"HTTP/1.1 400")
    head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nnot a length\r\n"
    assert answer_of(dial(head))[0] == 400


def test_requests_on_one_connection_that_wait_are_bounded(dial: Dial) -> None:
    said = read_to_end(dial(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n" * 3000))
    assert said.count(b"HTTP/1.1 200") == 1


def test_the_answer_to_a_body_too_large_arrives_whatever_is_still_sent(dial: Dial) -> None:
    connection = dial(b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 20000000\r\n\r\n")
    for _ in range(100):
        connection.sendall(bytes(100_000))
    status, told = answer_of(connection)
    assert (status, "larger than" in told["error"]) == (413, True)
    assert wait_for_end(connection) < LIMIT_S + 3


def test_requests_that_come_together_are_answered_in_their_order(dial: Dial) -> None:
    paths = [b"/v2", b"/v2/health/live", b"/v2/models/lamps/re%61dy?x=1", b"http://x/v2/health/ready?x=1", b"/nothing"]
    connection = dial(b"".join(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n" for path in paths[:-1]))
    connection.sendall(ASK + b"GET /nothing HTTP/1.0\r\n\r\n")
    answers = [answer_of(one) for one in [Buffered(connection)] * 6]
    assert [status for status, _ in answers] == [200, 200, 200, 200, 200, 404]
    assert [next(iter(told)) for _, told in answers] == ["name", "live", "ready", "ready", "tenant", "error"]
    assert wait_for_end(connection) < 0.5, "HTTP/1.0 keeps no connection"


class Buffered:
    """Reads one byte at a time, so that nothing of the next answer is taken."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def recv(self, most: int) -> bytes:
        return self.connection.recv(1)


def test_a_head_is_answered_by_a_head_and_the_connection_goes_on(dial: Dial) -> None:
    connection = dial(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
    time.sleep(0.2)
    said = connection.recv(100_000)
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert said.endswith(b"\r\n\r\n")
    assert int(said.split(b"content-length: ")[1].split(b"\r\n")[0]) > 1000
    connection.sendall(ASK)
    assert answer_of(connection)[0] == 200


def test_who_waits_for_a_word_before_the_body_gets_it_unless_the_request_is_refused(dial: Dial) -> None:
    head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    connection = dial(head % len(PICTURE))
    assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(PICTURE)
    assert answer_of(connection)[0] == 200
    assert answer_of(dial(head % 10_000_000))[0] == 413


def test_an_idle_connection_ends_in_peace_and_one_in_use_does_not(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.publish("lamps", export())
    with bit_serve(store, tmp_path, "--keep_alive_s", "1", "--header_timeout_s", "30") as service:
        address = "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        with (
            socket.create_connection(address, timeout=15) as used,
            socket.create_connection(address, timeout=15) as idle,
        ):
            idle.sendall(ASK)
            assert answer_of(idle)[0] == 200
            began, left_s = time.monotonic(), None
            while time.monotonic() < began + 2.5:
                used.sendall(ASK)
                assert answer_of(used)[0] == 200
                time.sleep(0.4)
            left_s = wait_for_end(idle)
            assert left_s < 0.1
            assert 0.5 < wait_for_end(used) < 3


@pytest.mark.parametrize(
    ("headers", "match"),
    [
        ([(b"x-name", b"a\r\nx-other: b")], "ends its line"),
        ([(b"x-name", b"a\nb")], "ends its line"),
        ([(b"content-length", b"3")], "of 2 bytes says that it has b'3'"),
    ],
)
def test_what_would_be_more_or_less_than_one_answer_is_not_written(headers: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rendered(200, headers, b"{}", head_only=False, close=False)


def test_a_deadline_moves_and_its_timer_follows() -> None:
    async def missed(*moves: tuple[float, float | None]) -> float | None:
        """moves: after so many seconds the deadline is set to so many more, None clears it."""
        loop, rang = asyncio.get_running_loop(), []
        deadline = Deadline(loop, lambda: rang.append(loop.time()))
        began = loop.time()
        for pause, seconds in moves:
            await asyncio.sleep(pause)
            if seconds is None:
                deadline.clear()
            else:
                deadline.set(seconds)
        await asyncio.sleep(0.5)
        assert len(rang) <= 1
        deadline.end()
        return rang[0] - began if rang else None

    assert asyncio.run(missed((0, 0.1))) == pytest.approx(0.1, abs=0.09)
    assert asyncio.run(missed((0, 0.1), (0.05, 0.3))) == pytest.approx(0.35, abs=0.09)
    assert asyncio.run(missed((0, 60), (0, 0.1))) == pytest.approx(0.1, abs=0.09)
    assert asyncio.run(missed((0, 0.1), (0.02, None))) is None
    assert asyncio.run(missed((0, 0.1), (0.02, None), (0.2, 0.1))) == pytest.approx(0.32, abs=0.09)


def test_an_application_that_fails_or_says_nothing_is_told_as_an_internal_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            raise RuntimeError("no lifespan here")
        if scope["path"] == "/fails":
            raise RuntimeError("a secret of the inside")
        if scope["path"] == "/breaks":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"a\r\nb: c")]})
            await send({"type": "http.response.body", "body": b"{}"})
        if scope["path"] == "/streams":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for part in (b"a", b"b"):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def ask(client: httpx.AsyncClient, address: str) -> list[httpx.Response]:
        return [await client.get(f"{address}/{path}") for path in ("fails", "breaks", "silent", "streams")]

    *failed, streamed = asyncio.run(served(app, ask))
    assert [(one.status_code, one.json()) for one in failed] == [(500, {"error": "internal error"})] * 3
    assert (streamed.text, streamed.headers["content-length"]) == ("ab", "2")
    assert "a secret of the inside" in caplog.text


Asking = Callable[[httpx.AsyncClient, str], Awaitable[list[httpx.Response]]]


STRICT = wire.protocol(wire.Limits(1, 1, 1))


async def served(
    app: object, ask: Asking, most: int | None = None, limits: type[wire.Connection] = STRICT
) -> list[httpx.Response]:
    """What `ask` gets of a server with such connections. most: connections at once."""
    config = uvicorn.Config(app, port=0, http=limits, limit_concurrency=most, ws="none", log_config=None)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    async with httpx.AsyncClient() as client:
        answers = await ask(client, address)
    server.should_exit = True
    await serving
    return answers


def test_one_connection_too_many_and_a_page_that_fails_are_told_in_the_apis_own_form() -> None:
    nothing: list = [None] * 7

    async def ask(client: httpx.AsyncClient, address: str) -> list[httpx.Response]:
        return [await client.get(f"{address}/v1/tenants")]

    [crowded] = asyncio.run(served(pages(Pages(*nothing)), ask, most=1))
    assert (crowded.status_code, "connections" in crowded.json()["error"]) == (503, True)
    assert crowded.headers["retry-after"] == "1"
    [failed] = asyncio.run(served(pages(Pages(*nothing)), ask))
    assert (failed.status_code, failed.json()["error"]) == (500, "internal error")


def test_a_connection_that_ended_leaves_nothing_in_memory() -> None:
    """Not even until the next collection of garbage; and one that stays, nothing of what it answered."""
    made: list[weakref.ref[wire.Connection]] = []

    class Watched(wire.Connection):
        limits = wire.Limits(5, 5, 5)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            made.append(weakref.ref(self))

    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(1_000_000)})

    async def ask(client: httpx.AsyncClient, address: str) -> list[httpx.Response]:
        answers = [await client.get(address), await client.post(address, content=bytes(50_000))]
        [connection] = [one() for one in made]
        assert connection is not None
        assert connection.request is not None
        assert (connection.request.parts, connection.request.body) == ([], b"")
        async with httpx.AsyncClient() as other:
            for _ in range(5):
                await other.get(address, headers={"connection": "close"})
        del connection
        await client.aclose()
        await asyncio.sleep(0.2)
        assert [one() for one in made] == [None] * 6
        return answers

    gc.disable()
    try:
        assert [one.status_code for one in asyncio.run(served(app, ask, limits=Watched))] == [200, 200]
    finally:
        gc.enable()


def test_a_body_that_breaks_or_a_client_that_leaves_is_no_error_of_the_service(strict: Service, dial: Dial) -> None:
    head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\n"
    assert answer_of(dial(head + b"transfer-encoding: chunked\r\n\r\nZZ\r\n"))[0] == 400
    for left in (b"expect: 100-continue\r\ncontent-length: 1000\r\n\r\n", b"content-length: 1000\r\n\r\nabc"):
        dial(head + left).close()
    connection = dial(b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: ")
    for part in (*[b"y" * 60_000] * 2, b"y" * 6_000 + b"\r\n\x00: broken\r\n\r\n"):  # both too large and broken
        connection.sendall(part)
        time.sleep(0.05)
    assert answer_of(connection)[0] == 400
    assert strict.classify("lamps", PICTURE).status_code == 200
    assert "Traceback" not in strict.log.read_text()


def test_a_header_that_began_behind_a_request_has_its_time_only(dial: Dial) -> None:
    connection = dial(ASK + b"GET /v2 HTTP/1.1\r\nho")
    assert answer_of(connection)[0] == 200
    assert wait_for_end(connection) < LIMIT_S + 1


def test_a_refused_body_that_came_whole_leaves_the_connection_for_later(dial: Dial) -> None:
    connection = dial(b"POST /v1/nobody/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
    assert answer_of(connection)[0] == 404
    connection.sendall(bytes(1000))
    time.sleep(LIMIT_S + 1)
    connection.sendall(ASK)
    assert answer_of(connection)[0] == 200
    waits = b"POST /v1/nobody/classify HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n"
    assert b"connection: close" in read_to_end(dial(waits)), "whether the body follows cannot be told"


def test_what_runs_is_not_cut_off_by_a_header_that_the_service_does_not_read() -> None:
    async def app(scope: dict, receive: Callable, send: Callable) -> None:
        await asyncio.sleep(1.5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def ask(client: httpx.AsyncClient, address: str) -> list[httpx.Response]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit(":", 1)[1]))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 2 + b"GET / HTT")
        await writer.drain()
        said = await reader.read()
        assert said.count(b"done") == 2
        writer.close()
        return []

    assert asyncio.run(served(app, ask)) == []
