"""Keys and quotas: who may ask, how much, and that a refusal comes at the headers."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.errors import TooManyRequests, Unauthorized
from services.inference.tenants import ANYBODY, Bucket, Quota, Tenants
from tests.services.exports import export, gray_png
from tests.services.running import Folder, Service, bit_serve


def make_key(file: Path, tenant: str, *flags: str) -> str:
    command = [sys.executable, "-c", "from services.inference.tenants import main; main()", tenant, "--file", str(file)]
    return subprocess.run([*command, *flags], check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def admitted(tenants: Tenants, tenant: str, size_bytes: int) -> Iterator[Quota]:
    gate = tenants.admit(tenant, size_bytes)
    yield gate.enter()
    gate.leave()


class Guarded(Service):
    keys: dict[str, str]
    file: Path

    def ask(self, tenant: str, key: str | None, **headers: str) -> httpx.Response:
        given = {"authorization": f"Bearer {key}"} if key else {}
        return self.http.post(f"/v1/{tenant}/classify", content=gray_png(10), headers=given | headers)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    file, store = folder / "tenants.json", Folder(folder)
    keys = {tenant: make_key(file, tenant) for tenant in ("lamps", "movers", "*", "unserved")}
    for tenant in ("lamps", "movers", "slow", "wasteful"):
        store.publish(tenant, export())
    limits = json.loads(file.read_text())
    limits["slow"] = {"keys": [], "requests_per_s": 2, "concurrent": 1, "bytes_per_s": 1000}
    limits["wasteful"] = {"bytes_per_s": 1000}
    file.write_text(json.dumps(limits))
    with bit_serve(store, folder, "--tenants", str(file)) as service:
        service.__class__ = Guarded
        assert isinstance(service, Guarded)
        service.keys, service.file = keys, file
        yield service


def test_a_key_opens_its_tenant_and_no_other(guarded: Guarded) -> None:
    assert guarded.ask("lamps", guarded.keys["lamps"]).status_code == 200
    assert guarded.ask("lamps@champion", guarded.keys["lamps"]).status_code == 200
    assert guarded.http.post(
        "/v1/lamps/classify", content=gray_png(1), headers={"x-api-key": guarded.keys["lamps"]}
    ).is_success
    answer = guarded.ask("lamps", guarded.keys["movers"])
    assert (answer.status_code, answer.json()["error"]) == (403, "this key is not one of 'lamps'")
    for key in (None, "guess"):
        answer = guarded.ask("lamps", key)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    # Who isn't let in does not even learn which tenants there are.
    assert guarded.ask("nobody", guarded.keys["lamps"]).status_code == 403
    assert "lamps@champion" in guarded.ask("nobody", guarded.keys["*"]).json()["error"]
    # A tenant without a version learns nothing of the others, wherever it asks.
    told = [guarded.ask("unserved", guarded.keys["unserved"])]
    for page in ("", "/ready", "/config"):
        told.append(guarded.http.get(f"/v2/models/unserved{page}", headers={"x-api-key": guarded.keys["unserved"]}))
    assert {answer.status_code for answer in told} == {404}
    assert not [answer.text for answer in told if "lamps" in answer.text]


def test_the_operators_key_opens_all_and_a_tenant_sees_itself_only(guarded: Guarded) -> None:
    def seen(key: str) -> set[str]:
        answer = guarded.http.get("/v1/tenants", headers={"authorization": f"Bearer {guarded.keys[key]}"})
        return {one["tenant"] for one in answer.json()["served"]}

    assert guarded.ask("movers", guarded.keys["*"]).status_code == 200
    assert seen("*") == {"lamps", "movers", "slow", "wasteful"}
    assert seen("lamps") == {"lamps"}
    assert guarded.http.get("/v1/tenants").status_code == 401
    assert guarded.http.get("/v2/models/lamps").status_code == 401
    assert guarded.http.get("/v2/health/ready").status_code == 200


def test_only_hashes_are_kept(guarded: Guarded) -> None:
    kept = guarded.file.read_text() + guarded.log.read_text()
    assert not [key for key in guarded.keys.values() if key in kept]


def test_over_its_rate_a_tenant_is_told_when_to_come_again(guarded: Guarded) -> None:
    answers = [guarded.ask("slow", guarded.keys["*"]) for _ in range(4)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert "2 requests per second" in refused[0].json()["error"]
    assert int(refused[0].headers["retry-after"]) >= 1
    assert guarded.ask("lamps", guarded.keys["lamps"]).status_code == 200  # the others notice nothing


def test_a_body_whose_length_nobody_told_counts_as_well(guarded: Guarded) -> None:
    def chunked() -> httpx.Response:
        key = {"x-api-key": guarded.keys["*"]}
        return guarded.http.post("/v1/slow/classify", content=iter([gray_png(10), bytes(200_000)]), headers=key)

    wait_until(lambda: chunked().status_code == 200, 20)
    time.sleep(1.1)  # the requests' own bucket is full again; that of the bytes is for minutes to come not
    refused = chunked()
    assert refused.status_code == 429
    assert "1000 bytes per second" in refused.json()["error"]


def test_a_body_that_is_refused_counts_as_well(guarded: Guarded) -> None:
    def garbage() -> httpx.Response:
        headers = {"x-api-key": guarded.keys["*"], "content-encoding": "gzip"}
        return guarded.http.post("/v1/wasteful/classify", content=iter([bytes(100_000)]), headers=headers)

    assert garbage().status_code == 400
    assert "1000 bytes per second" in garbage().json()["error"]


def test_a_refusal_does_not_wait_for_the_body(guarded: Guarded) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    for headers, status in ((b"", b"401"), (b"x-api-key: " + guarded.keys["*"].encode() + b"\r\n", b"413")):
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\n" + headers + b"content-length: 99999999\r\n\r\n"
            connection.sendall(head)  # and nothing of the body
            assert connection.recv(64).split()[1] == status


def test_a_new_key_is_taken_over_and_a_broken_file_changes_nothing(guarded: Guarded) -> None:
    before = guarded.file.read_text()
    try:
        key = make_key(guarded.file, "lamps", "--revoke")
        wait_until(lambda: guarded.ask("lamps", key).status_code == 200)
        assert guarded.ask("lamps", guarded.keys["lamps"]).status_code == 401
        guarded.file.write_text('{"lamps": {"request_per_s": 1}}')
        wait_until(lambda: "keys and quotas stay as they were" in guarded.log.read_text())
        assert "lamps.request_per_s" in guarded.log.read_text()
        assert guarded.ask("lamps", key).status_code == 200
    finally:
        guarded.file.write_text(before)
    wait_until(lambda: guarded.ask("lamps", guarded.keys["lamps"]).status_code == 200)


def wait_until(holds, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    rate=st.floats(0.5, 100),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_a_bucket_lets_no_more_through_than_its_rate(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    bucket, passed = Bucket(rate, clock), 0
    for pause in pauses:
        clock.now += pause
        if wait_s := bucket.wait_s(1):
            clock.now += wait_s * 1.000001
            assert bucket.wait_s(1) == 0, "after the time that was told it must pass"
        bucket.take(1)
        passed += 1
    assert passed <= max(1.0, rate) + rate * clock.now + 1


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    tenants = Tenants(None, clock, quotas={"a": Quota(requests_per_s=2, bytes_per_s=10)})
    with admitted(tenants, "a", 10):
        pass
    for _ in range(5):
        with pytest.raises(TooManyRequests, match="10 bytes per second"), admitted(tenants, "a", 10):
            pass  # and not its requests


def test_without_any_key_in_the_file_nobody_is_let_in(tmp_path: Path) -> None:
    (tmp_path / "tenants.json").write_text('{"a": {"keys": []}}')  # the last one was revoked
    with pytest.raises(Unauthorized):
        Tenants(tmp_path / "tenants.json").authorize("a", {b"x-api-key": b"guess"})
    assert Tenants(None).authorize("a", {}) == ANYBODY


@pytest.mark.parametrize("pasted", ["1Sx3Ucu9KqUjSH9bMWZDDp1cnXNbHoRcWkM2xUhcXjk", "g" * 64])
def test_a_key_where_its_hash_belongs_is_refused_and_not_told(tmp_path: Path, pasted: str) -> None:
    (tmp_path / "tenants.json").write_text(json.dumps({"a": {"keys": [pasted]}}))
    with pytest.raises(ValueError, match=r"a\.keys.*no SHA-256 .*bit-serve-key") as refused:
        Tenants(tmp_path / "tenants.json")
    assert pasted not in str(refused.value)


def test_what_runs_at_once_is_bounded_and_given_back() -> None:
    tenants = Tenants(None, quotas={"a": Quota(concurrent=2)})
    inside, leave = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        with admitted(tenants, "a", 0):
            inside.release()
            leave.wait(5)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(hold) for _ in range(2)]
        for _ in running:
            inside.acquire()
        with pytest.raises(TooManyRequests, match="2 requests of 'a' are running"), admitted(tenants, "a", 0):
            pass
        leave.set()
    with admitted(tenants, "a", 0) as quota:
        assert quota.concurrent == 2


def test_a_wrong_file_is_refused_at_the_start_with_the_key_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "tenants.json").write_text('{"acme": {"weight": -1}}')
    command = [sys.executable, "-m", "services.inference.app", "--models", str(tmp_path)]
    done = subprocess.run(
        [*command, "--tenants", str(tmp_path / "tenants.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "acme.weight" in done.stderr


def test_a_key_is_not_added_to_a_file_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "tenants.json").write_text("")
    program = Path(sys.executable).with_name("bit-serve-key")
    command = [program, "acme", "--file", str(tmp_path / "tenants.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "tenants.json is not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "tenants.json").read_text() == ""


def test_a_service_for_one_tenant_follows_no_other(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    for tenant in ("acme", "lamps"):
        store.publish(tenant, export())
    with bit_serve(store, tmp_path, "--only", '["acme"]') as service:
        assert service.classify("acme", gray_png(10)).status_code == 200
        assert service.classify("lamps", gray_png(10)).status_code == 404


def test_an_edit_of_the_file_forgives_nobody_else(tmp_path: Path) -> None:
    file, clock = tmp_path / "tenants.json", Clock()

    def write(**quotas: dict) -> None:
        file.unlink(missing_ok=True)  # seen by its inode, however coarse the clock of files is
        file.write_text(json.dumps(quotas))

    write(a={"requests_per_s": 1}, b={"requests_per_s": 1})
    tenants = Tenants(file, clock)
    for tenant in "ab":
        with admitted(tenants, tenant, 0):
            pass
    write(a={"requests_per_s": 1, "keys": ["0" * 64]}, b={"requests_per_s": 2})
    assert tenants.reload()
    with pytest.raises(TooManyRequests), admitted(tenants, "a", 0):
        pass
    with admitted(tenants, "b", 0):  # its limit is another now
        pass


def test_what_is_late_keeps_its_place_until_a_worker_drops_it(tmp_path: Path) -> None:
    """Else deadlines of a few milliseconds would let in any number of requests, each with its body in memory."""
    file, store = tmp_path / "tenants.json", Folder(tmp_path)
    key = make_key(file, "*")
    limits = json.loads(file.read_text())
    file.write_text(json.dumps(limits | {"hasty": {"concurrent": 1}}))
    store.publish("slow", export(mflop=1000))
    store.publish("hasty", export())
    many = [("file", (f"{n}.png", gray_png(n))) for n in range(40)]
    with (
        bit_serve(store, tmp_path, "--tenants", str(file), "--workers", "1") as service,
        ThreadPoolExecutor(1) as other,
    ):
        service.http.headers["authorization"] = f"Bearer {key}"
        assert service.classify("hasty", gray_png(1)).status_code == 200
        busy = other.submit(service.http.post, "/v1/slow/classify", files=many)
        time.sleep(0.3)
        hurried = [
            service.http.post("/v1/hasty/classify", content=gray_png(1), headers={"X-Timeout-Ms": "50"}).status_code
            for _ in range(3)
        ]
        assert not busy.done()
        assert hurried == [504, 429, 429]
        assert busy.result().status_code == 200
        time.sleep(0.3)
        assert service.classify("hasty", gray_png(1)).status_code == 200
