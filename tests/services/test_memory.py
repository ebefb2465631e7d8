"""More models than memory, rollbacks, and a registry that is down: what stays served, and at what cost."""

import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from services.inference.aliases import Wanted
from services.inference.cache import KEPT_S, Cache
from services.inference.engine import Session
from services.inference.follower import Follower
from services.inference.metrics import Metrics
from services.inference.models import Cold, Models, Served
from services.inference.priority import give_way
from services.inference.registry import FolderRegistry, RegistryDown
from tests.services.exports import export, gray_png
from tests.services.running import Folder, MLflow, Service, bit_serve, mlflow_server
from tests.services.test_tenants import make_key

PADDING = 4 * 2**20  # bytes that make a small export large


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(export())


def served(session: Session, tenant: str, version: str = "1", size_bytes: int = 100) -> Served:
    return Served(tenant, version, "0" * 64, session, 0.0, size_bytes)


def test_the_least_recently_used_gives_way_and_the_pinned_never(session: Session) -> None:
    models = Models(budget_bytes=250, pinned=["a"])
    for tenant in ("a", "b", "c"):
        models.point(Wanted(tenant, "champion", "1"))
    assert models.put(served(session, "a")) == []
    assert models.put(served(session, "b")) == []
    models.find("a")
    assert [one.tenant for one in models.put(served(session, "c"))] == ["b"]
    with pytest.raises(Cold):
        models.find("b")
    assert models.find("a")[0].tenant == "a"


def test_a_replaced_version_gives_way_before_one_in_service(session: Session) -> None:
    models = Models(budget_bytes=250)
    models.put(served(session, "a", "1"))
    models.point(Wanted("a", "champion", "1"))
    models.put(served(session, "a", "2"))
    models.point(Wanted("a", "champion", "2"))
    models.find("a", "1")  # used last, but nobody's champion any more
    models.point(Wanted("b", "champion", "1"))
    assert [(one.tenant, one.version) for one in models.put(served(session, "b"))] == [("a", "1")]


def test_only_the_newest_replaced_version_stays_warm(session: Session) -> None:
    models = Models()
    for version in ("1", "2", "3"):
        models.put(served(session, "a", version))
        models.point(Wanted("a", "champion", version))
    assert [one.version for one in models.tidy()] == ["1"]
    assert {one.version for one in models.all()} == {"2", "3"}


def test_a_challenger_that_moves_leaves_the_champions_predecessor_warm(session: Session) -> None:
    models = Models()
    for alias, version in (("champion", "1"), ("challenger", "2"), ("champion", "3"), ("challenger", "4")):
        models.put(served(session, "a", version))
        models.point(Wanted("a", alias, version))
    assert models.tidy() == []
    models.put(served(session, "a", "5"))
    models.point(Wanted("a", "challenger", "5"))
    assert [one.version for one in models.tidy()] == ["2"], "of each alias the newest that was replaced stays"
    models.point(Wanted("a", "champion", "1"))
    assert models.find("a")[0].version == "1"


def test_a_version_whose_alias_moved_while_it_was_loading_does_not_stay(session: Session) -> None:
    models = Models()
    models.put(served(session, "a", "2"))
    models.point(Wanted("a", "champion", "2"))
    models.put(served(session, "a", "1"))  # a request asked for it when it was the champion
    models.put(served(session, "a", "3"))
    models.point(Wanted("a", "champion", "3"))
    assert [one.version for one in models.tidy()] == ["1"]
    models.point(Wanted("a", "champion", "2"))
    assert models.find("a")[0].replaced is None


def follower(registry: FolderRegistry) -> Follower:
    return Follower(registry, Models(), Metrics(), 0.1, 1)


def test_one_tenants_trouble_does_not_keep_the_others_from_their_turn(tmp_path: Path) -> None:
    good, golden = export(), base64.b64encode(gray_png(200))
    (tmp_path / "a.onnx").write_bytes(good)
    (tmp_path / "b.onnx").write_bytes(good.replace(golden, b"A" * len(golden)))  # a golden picture that is none
    (tmp_path / "c.onnx").symlink_to("nowhere")
    (tmp_path / "d.onnx").write_bytes(good)
    registry = FolderRegistry(tmp_path)
    following = follower(registry)
    assert len(registry.poll()) == 3
    stat = (tmp_path / "a.onnx").stat()
    (tmp_path / "a.onnx").write_bytes(good[:-1] + b"?")  # the same to a look at the folder, another file to its reader
    os.utime(tmp_path / "a.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RegistryDown, match=r"a\.onnx is being replaced"):
        following.look()
    assert [(one.tenant, one.alias) for one in following.models.aliases()] == [("d", "champion")]
    assert [(one.tenant, why) for one, why in following.refused.items()] == [("b", "it cannot be loaded; see the log")]
    assert following.polled
    (tmp_path / "b.onnx").unlink()
    (tmp_path / "a.onnx").write_bytes(good)
    following.look()
    assert [one.tenant for one in following.models.aliases()] == ["a", "d"]
    series = [
        s.labels for m in following.metrics.registry.collect() for s in m.samples if s.name == "bit_refused_version"
    ]
    assert series == [], "of a version that is gone nothing is told, not even 0"


def test_a_registry_that_is_down_for_all_is_no_start(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(export())
    registry = FolderRegistry(tmp_path)
    following, [wanted] = follower(registry), registry.poll()
    stat = (tmp_path / "a.onnx").stat()
    (tmp_path / "a.onnx").write_bytes(export()[:-1] + b"?")
    os.utime(tmp_path / "a.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert registry.poll() == {wanted}
    with pytest.raises(RegistryDown):
        following.look()
    assert not following.polled


class Busy(FolderRegistry):
    """While an export is fetched, bodies of requests come in."""

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        self.bodies = np.ones(200 * 2**20, np.uint8)
        return super().fetch(wanted)


def test_a_small_model_is_not_charged_for_what_else_the_process_took_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(export())
    following = follower(Busy(tmp_path))
    following.look()
    [loaded] = following.models.all()
    assert loaded.size_bytes < 2**20


class Unreadable(FolderRegistry):
    """A registry that is down beside a cache on a broken disk."""

    def poll(self) -> set[Wanted]:
        raise RegistryDown("it does not answer")

    def remembered(self) -> set[Wanted]:
        raise OSError(5, "Input/output error")


def test_the_follower_outlives_a_broken_cache_and_those_who_no_longer_wait(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(export())
    [wanted] = FolderRegistry(tmp_path).poll()
    following = follower(Unreadable(tmp_path))
    left = following.load(Cold(Wanted("b", "champion", "1")))
    assert left.cancel()
    following.start()
    try:
        assert following.load(Cold(wanted)).result(timeout=20).version == wanted.version
    finally:
        following.stop()


def test_a_folder_that_is_gone_takes_no_tenant_along(tmp_path: Path) -> None:
    """Not mounted, or misspelt at the start: nothing changes, and nobody is told that the service is ready."""
    folder, mounted = tmp_path / "exports", tmp_path / "mounted"
    following = follower(FolderRegistry(folder))
    with pytest.raises(RegistryDown, match="No such file"):
        following.look()
    mounted.mkdir()
    (mounted / "a.onnx").write_bytes(export())
    folder.symlink_to(mounted)
    following.look()
    folder.unlink()
    with pytest.raises(RegistryDown):
        following.look()
    folder.symlink_to(
        "/proc/sys"
    )  # what is seen of a mount point once its file system is gone: an empty folder of another
    with pytest.raises(RegistryDown, match="is it still mounted"):
        following.look()
    assert [one.tenant for one in following.models.aliases()] == ["a"]
    folder.unlink()
    folder.symlink_to(mounted)
    (mounted / "a.onnx").unlink()
    following.look()
    assert following.models.aliases() == []


def padded(number: int) -> bytes:
    """An export of its own for each number, with a megabyte-sized tail in its metadata."""
    return export(classes=[f"dark-{number}", "x" * PADDING])


@pytest.mark.parametrize("cold", ["wait", "refuse"])
def test_models_beyond_the_memory_are_loaded_when_they_are_asked_for(tmp_path: Path, cold: str) -> None:
    store = Folder(tmp_path)
    for number in range(6):
        store.publish(f"t{number}", padded(number))
    flags = ("--memory_mb", "14", "--cold", cold, "--pinned", '["t5"]')
    with bit_serve(store, tmp_path, *flags) as service:
        warm = {one["tenant"] for one in service.http.get("/v1/tenants").json()["served"] if one["in_memory"]}
        assert "t5" in warm
        assert len(warm) <= 3
        asked = next(f"t{number}" for number in range(5) if f"t{number}" not in warm)
        first = service.classify(asked, gray_png(10), "?top=1")
        if cold == "refuse":
            assert first.status_code == 503
            assert int(first.headers["retry-after"]) >= 1
            end = time.monotonic() + 10
            while (first := service.classify(asked, gray_png(10), "?top=1")).status_code == 503:
                assert time.monotonic() < end
                time.sleep(0.05)
        assert first.json()["predictions"][0]["class"] == f"dark-{asked[1:]}"
        for number in range(6):  # every one can be had, whatever must give way
            while (answer := service.classify(f"t{number}", gray_png(10), "?top=1")).status_code == 503:
                time.sleep(0.05)
            assert answer.json()["predictions"][0]["class"] == f"dark-{number}"
        warm = {one["tenant"] for one in service.http.get("/v1/tenants").json()["served"] if one["in_memory"]}
        assert "t5" in warm
        assert len(warm) <= 3


def test_who_waits_for_a_cold_model_counts_as_running_and_waits_no_longer_than_the_deadline(tmp_path: Path) -> None:
    store, key = Folder(tmp_path), make_key(tmp_path / "tenants.json", "one")
    quotas = json.loads((tmp_path / "tenants.json").read_text())
    quotas["one"]["concurrent"] = 1
    (tmp_path / "tenants.json").write_text(json.dumps(quotas))
    store.publish("one", export())
    with (
        bit_serve(store, tmp_path, "--tenants", str(tmp_path / "tenants.json"), "--timeout_ms", "2000") as service,
        ThreadPoolExecutor(1) as pool,
    ):
        service.http.headers["x-api-key"] = key
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "pipe").rename(tmp_path / "one.onnx")  # whoever reads it waits
        service.http.post("/v2/repository/models/one/unload")
        time.sleep(0.5)
        waits = pool.submit(service.classify, "one", gray_png(10))
        time.sleep(0.3)
        began = time.monotonic()
        assert service.classify("one", gray_png(10)).status_code == 429
        assert time.monotonic() - began < 1
        page = service.http.get("/v2/models/one")
        assert (page.status_code, waits.result().status_code) == (504, 504)
        assert "still being loaded" in page.json()["error"]
        (tmp_path / "one.onnx").write_bytes(b"")


def test_many_that_ask_for_one_cold_model_load_it_once(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.publish("one", padded(1))
    with bit_serve(store, tmp_path) as service:
        service.http.post("/v2/repository/models/one/unload")

        def loads() -> float:
            lines = service.http.get("/metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith("bit_load_seconds_count")).split()[1])

        before = loads()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: service.classify("one", gray_png(10)).status_code, range(16)))
        assert answers == [200] * 16
        assert loads() - before == 1


def test_300_small_tenants_on_one_instance(tmp_path: Path) -> None:
    store, data = Folder(tmp_path), export()
    for number in range(300):
        store.publish(f"tenant-{number:03}", data)
    with bit_serve(store, tmp_path) as service:
        assert len(service.http.get("/v1/tenants").json()["served"]) == 300
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda n: service.classify(f"tenant-{n:03}", gray_png(10)).json()["tenant"], range(300))
            assert list(answers) == [f"tenant-{number:03}" for number in range(300)]


def test_a_rollback_is_instant_while_the_old_version_is_warm(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    with bit_serve(store, tmp_path) as service:
        first = store.publish("lamps", export())
        service.wait_until("lamps", first)
        service.wait_until("lamps", store.publish("lamps", export(sign=-1)))
        loaded = service.log.read_text().count("left memory")
        before = loads(service)
        service.wait_until("lamps", store.publish("lamps", export()))
        assert loads(service) == before, "taken from memory, not loaded again"
        assert service.log.read_text().count("left memory") == loaded


def loads(service: Service) -> float:
    lines = service.http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("bit_load_seconds_count")).split()[1])


def test_while_mlflow_is_down_the_verified_cache_serves(tmp_path: Path) -> None:
    def kept() -> int:
        return len(Cache(tmp_path / "cache").remembered())

    with mlflow_server(tmp_path) as uri:
        store = MLflow(uri, tmp_path)
        version = store.publish("lamps", export())
        for tenant in ("gone", "later"):
            store.publish(tenant, export(classes=[tenant, "bright"]))
        with bit_serve(store, tmp_path) as service:
            service.wait_until("lamps", version)
            wait_for(lambda: kept() == 3)
            store.client.delete_registered_model_alias("gone", "champion")
            wait_for(lambda: kept() == 2)
        store.client.delete_registered_model_alias("later", "champion")  # while no instance runs
        with bit_serve(store, tmp_path):
            wait_for(lambda: kept() == 1)
    # MLflow has ended. A new instance starts from what the last one knew, without what was taken out of the registry.
    with bit_serve(store, tmp_path) as service:
        assert [one["tenant"] for one in service.http.get("/v1/tenants").json()["served"]] == ["lamps"]
        answer = service.classify("lamps", gray_png(10)).json()
        assert (answer["version"], answer["predictions"][0]["class"]) == (version, "dark")
        assert "bit_registry_up 0.0" in service.http.get("/metrics").text
    # A cache that somebody changed is not served.
    for cached in (tmp_path / "cache").glob("*.onnx"):
        cached.write_bytes(export(sign=-1))
    with bit_serve(store, tmp_path, ready=False) as service:
        time.sleep(1)
        assert service.http.get("/v2/health/ready").status_code == 503
        assert service.classify("lamps", gray_png(10)).status_code == 404


def test_beyond_the_cache_a_start_without_mlflow_serves_what_was_read_last(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as uri:
        store = MLflow(uri, tmp_path)
        for number in range(3):
            store.publish(f"t{number}", padded(number))
        limit = ("--cache_mb", "10")  # of 4 MB each
        with bit_serve(store, tmp_path, *limit) as service:
            for number in range(3):
                assert service.classify(f"t{number}", gray_png(10)).status_code == 200
            kept = {path.stem for path in (tmp_path / "cache").glob("*.onnx")}
            assert len(kept) == 2
    with bit_serve(store, tmp_path, *limit) as service:
        served = service.http.get("/v1/tenants").json()["served"]
        assert {one["sha256"] for one in served} == kept
        assert all(service.classify(one["tenant"], gray_png(10)).status_code == 200 for one in served)


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_alias_moved_by_hand_is_written_to_the_history_once(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as uri:
        store = MLflow(uri, tmp_path)
        first = store.publish("lamps", export())
        with bit_serve(store, tmp_path) as service, bit_serve(store, tmp_path) as other:
            service.wait_until("lamps", first)
            second = store.publish("lamps", export(sign=-1))
            service.wait_until("lamps", second)
            other.wait_until("lamps", second)
            end = time.monotonic() + 20
            while history(store) != (moves := [("none", first), (first, second)]) and time.monotonic() < end:
                time.sleep(0.1)
        assert history(store) == moves, "once, whichever instance saw it first"


def history(store: MLflow) -> list[tuple[str, str]]:
    """(from, to) of the promotions of `lamps`, oldest first."""
    experiment = store.client.get_experiment_by_name("promotions")
    if experiment is None:
        return []
    order = ["attributes.start_time ASC"]
    runs = store.client.search_runs([experiment.experiment_id], "tags.tenant = 'lamps'", order_by=order)
    return [(run.data.tags["from"], run.data.tags["to"]) for run in runs]


def test_without_write_back_nothing_is_written(tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as uri:
        store = MLflow(uri, tmp_path)
        version = store.publish("lamps", export())
        with bit_serve(store, tmp_path, "--write_back", "false") as service:
            service.wait_until("lamps", version)
        assert "serving.state" not in store.client.get_model_version("lamps", version).tags
        assert store.client.get_experiment_by_name("promotions") is None


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(Path("/dev/full/cache"), budget_bytes=10)  # no folder can be made there, as none can on a full disk
    cache.write(hashlib.sha256(b"x").hexdigest(), b"x")
    cache.remember(Wanted("a", "champion", "1"), "0" * 64)
    assert cache.read("0" * 64) is None


def digests(cache: Cache) -> set[str]:
    return {path.stem for path in cache.folder.glob("*.onnx")}


def test_exports_used_longest_ago_leave_the_cache_when_another_needs_their_room(tmp_path: Path) -> None:
    exports = {hashlib.sha256(data).hexdigest(): data for data in (bytes([n]) * 100 for n in range(5))}
    a, b, c, d, large = exports
    cache = Cache(tmp_path, budget_bytes=330)
    (tmp_path / "killed.part").write_bytes(b"x" * 30)  # counts as well, and is the oldest
    os.utime(tmp_path / "killed.part", (1, 1))
    for age, sha256 in enumerate((a, b, c)):
        cache.write(sha256, exports[sha256])
        cache.remember(Wanted(sha256[:4], "champion", "1"), sha256)
        os.utime(tmp_path / f"{sha256}.onnx", (age + 2, age + 2))
    assert digests(cache) == {a, b, c}
    assert cache.read(a) == exports[a]  # used
    cache.write(d, exports[d])
    assert digests(cache) == {a, c, d}
    assert not list(tmp_path.glob("*.part"))
    cache.write(large, exports[large] * 4)  # more than all of it
    assert digests(cache) == {a, c, d}
    assert {one.tenant for one in Cache(tmp_path).remembered()} == {a[:4], c[:4]}
    Cache(tmp_path).write(large, exports[large] * 4)  # 0: no limit
    assert digests(cache) == {a, c, d, large}


def test_an_export_whose_alias_is_gone_stays_a_day(tmp_path: Path) -> None:
    cache, long_ago = Cache(tmp_path), time.time() - 2 * KEPT_S
    a, b = (hashlib.sha256(data).hexdigest() for data in (b"a", b"b"))
    for sha256, data in ((a, b"a"), (b, b"b")):
        cache.write(sha256, data)
        cache.remember(Wanted(sha256[:4], "champion", "1"), sha256)
        os.utime(tmp_path / f"{sha256}.onnx", (long_ago, long_ago))  # loaded once, and served ever since
    cache.forget(a[:4], "champion")
    assert {one.tenant for one in Cache(tmp_path).remembered()} == {b[:4]}
    assert digests(cache) == {a, b}, "it may be wanted back"
    os.utime(tmp_path / f"{a}.onnx", (long_ago, long_ago))  # a day later
    cache.remember(Wanted("c", "champion", "1"), "0" * 64)
    assert digests(cache) == {b}


def test_a_file_that_another_instance_removes_is_a_miss(tmp_path: Path) -> None:
    data, stop, cache = b"x" * 100, threading.Event(), Cache(tmp_path / "cache", budget_bytes=150)
    sha256 = hashlib.sha256(data).hexdigest()
    cache.write(sha256, data)
    shown = cache.folder / f"{sha256}.onnx"
    shown.rename(tmp_path / "hidden")

    def other() -> None:
        while not stop.is_set():
            os.link(tmp_path / "hidden", shown)
            shown.unlink()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        reads = [cache.read(sha256) for _ in range(20_000)]
        sizes = [cache.size_bytes(sha256) for _ in range(20_000)]
    finally:
        stop.set()
        thread.join()
    assert set(reads) == {None, data}
    assert set(sizes) == {0, len(data)}
    cache.write("0" * 64, data)
    assert digests(cache) == {"0" * 64}


def test_the_cache_is_whole_whenever_the_process_dies(tmp_path: Path) -> None:
    cache, stop = Cache(tmp_path), threading.Event()

    def write() -> None:
        for number in range(200):
            cache.remember(Wanted("a", "champion", str(number)), f"{number:064}")
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        if cache.index.exists():
            json.loads(cache.index.read_text())
    writer.join()
    assert Cache(tmp_path).sha256_of(Wanted("a", "champion", "199")) == f"{199:064}"


def test_three_hundred_small_tenants_live_on_one_instance(tmp_path: Path) -> None:
    """Each answers for itself, and the process stays small: a head's worth of memory per tenant."""
    store, count = Folder(tmp_path), 300
    for number in range(count):
        store.publish(f"t{number:03}", export(classes=[f"dark-{number}", f"bright-{number}"]))
    with bit_serve(store, tmp_path) as service:
        told = service.http.get("/v1/tenants").json()["served"]
        assert len(told) == count
        assert all(one["in_memory"] for one in told)
        for number in range(0, count, 7):
            best = service.classify(f"t{number:03}", gray_png(250)).json()["predictions"][0]["class"]
            assert best == f"bright-{number}"
        resident_mb = int(Path(f"/proc/{service.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        assert resident_mb < 400


def test_a_thread_that_is_nicer_already_stays_so() -> None:
    """Without the right to go back, which containers lack, it would end with PermissionError."""
    reached: list[int] = []

    def work() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 17)
        give_way(5)
        reached.append(os.getpriority(os.PRIO_PROCESS, thread))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [17]
