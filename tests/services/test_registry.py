"""Following MLflow's registry when it, or what lies before it, misbehaves: a real server, behind a proxy that can lie."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from services.inference.aliases import Wanted
from services.inference.cache import Cache
from services.inference.errors import Refused
from services.inference.follower import Follower
from services.inference.metrics import Metrics
from services.inference.mlflow_registry import MLflowRegistry
from services.inference.models import Cold, Models
from services.inference.registry import FolderRegistry, Registry, RegistryDown
from tests.services.exports import export
from tests.services.running import MLflow, mlflow_server
from tests.services.test_memory import history, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflow]:
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(folder) as uri:
        yield MLflow(uri, folder)


@pytest.fixture
def store(server: MLflow) -> Iterator[MLflow]:
    """Its registry is empty again after the test."""
    yield server
    for model in server.client.search_registered_models():
        server.client.delete_registered_model(model.name)
    server.known.clear()


@dataclass
class Lie:
    """What the proxy answers instead of MLflow to paths that contain `path`."""

    status: int
    body: str = "<html>Sign in</html>"
    path: str = ""


@dataclass
class Proxy:
    uri: str
    lie: Lie | None = None


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            lie = running.lie
            if lie is not None and lie.path in self.path:
                status, kind, body = lie.status, "text/html", lie.body.encode()
            else:
                headers = {"Content-Type": self.headers.get("Content-Type", "")}
                answer = httpx.request(self.command, upstream + self.path, content=content, headers=headers)
                status, kind, body = answer.status_code, answer.headers["Content-Type"], answer.content
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 302:
                self.send_header("Location", "https://login.example/")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        running = Proxy(f"http://127.0.0.1:{listening.server_port}")
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield running
        finally:
            listening.shutdown()
            thread.join()


@contextmanager
def following(registry: Registry, budget_bytes: int = 0, retry_s: float = 0.0) -> Iterator[Follower]:
    """A follower that looks only when the test says so."""
    made = Follower(registry, Models(budget_bytes), Metrics(), 3600, 1, retry_s=retry_s)
    try:
        yield made
    finally:
        if isinstance(registry, MLflowRegistry):
            registry.http.close()


@pytest.fixture
def registry_at(tmp_path: Path) -> Callable[..., MLflowRegistry]:
    def make(uri: str, **options: float) -> MLflowRegistry:
        return MLflowRegistry(uri, Cache(tmp_path / "cache"), True, **options)

    return make


def uri_of(store: MLflow) -> str:
    return store.flags[1]


def served(made: Follower) -> list[tuple[str, str, str]]:
    return [(one.tenant, one.alias, one.version) for one in made.models.aliases()]


def state(store: MLflow, version: str, tenant: str = "lamps") -> str:
    return store.client.get_model_version(tenant, version).tags.get("serving.state", "")


def test_whatever_answers_in_mlflows_place_is_an_mlflow_that_is_down(
    store: MLflow, registry_at: Callable[..., MLflowRegistry]
) -> None:
    version = store.publish("lamps", export())
    with proxy(uri_of(store)) as before:
        with following(registry_at(before.uri)) as first:
            first.look()
        pages = [Lie(302), Lie(200), Lie(404), Lie(400), Lie(503)]
        for lie in (*pages, Lie(200, "[]"), Lie(404, '{"error_code": "ENDPOINT_NOT_FOUND"}')):
            before.lie = lie
            with following(registry_at(before.uri)) as second:
                second._look_safely()
                assert served(second) == [("lamps", "champion", version)], f"from the cache, whatever {lie} is"
                assert second.polled
                assert second.metrics.registry_up._value.get() == 0


def test_a_registry_that_is_suddenly_empty_is_not_believed_at_once(
    store: MLflow, registry_at: Callable[..., MLflowRegistry], tmp_path: Path
) -> None:
    version = store.publish("lamps", export())
    with following(registry_at(uri_of(store))) as first:
        first.look()
        store.client.delete_registered_model_alias("lamps", "champion")
        with pytest.raises(RegistryDown, match="no alias any more"):
            first.look()
        assert served(first) == [("lamps", "champion", version)]
    gone = pytest.raises(RegistryDown, match="no alias any more")
    with following(registry_at(uri_of(store))) as restarted, gone:  # knows from its cache that there was something
        restarted.look()
    with proxy(uri_of(store)) as between:
        registry = registry_at(between.uri, believe_empty_s=0.5)
        for lie in (None, Lie(503), None):  # empty, away for longer than that, empty again: a database being restored
            between.lie = lie
            with pytest.raises(RegistryDown, match="503" if lie else "no alias any more"):
                registry.poll()
            time.sleep(0.3)
        registry.http.close()
    with following(registry_at(uri_of(store), believe_empty_s=0)) as patient:
        patient.look()
        assert served(patient) == []
        assert patient.registry.remembered() == set()
    assert len(list((tmp_path / "cache").glob("*.onnx"))) == 1, "files stay a day"


def test_what_was_refused_is_tried_again(store: MLflow, registry_at: Callable[..., MLflowRegistry]) -> None:
    version = store.publish("lamps", export(), validation="none")
    [artifacts] = [store.folder / "artifacts"]
    with following(registry_at(uri_of(store))) as made:
        made.look()
        assert "validation=passed" in made.refused[Wanted("lamps", "champion", version)]
        store.client.set_model_version_tag("lamps", version, "validation", "passed")
        artifacts.rename(hidden := store.folder / "hidden")
        made.look()
        assert "no get-artifact" in made.refused[Wanted("lamps", "champion", version)]
        assert state(store, version).startswith("refused: MLflow has no get-artifact")
        hidden.rename(artifacts)
        made.look()
        assert made.refused == {}
        assert served(made) == [("lamps", "champion", version)]
        assert state(store, version).startswith("live since")


def test_between_two_tries_of_a_refused_version_lies_a_pause(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(export(golden_off=0.2))
    registry = Counting(tmp_path)
    with following(registry, retry_s=3600) as made:
        made.look()
        made.look()
    assert registry.fetched == 1


class Counting(FolderRegistry):
    fetched = 0

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        self.fetched += 1
        return super().fetch(wanted)


def test_a_cold_version_that_cannot_be_loaded_is_refused_and_not_fetched_by_every_request(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(export(golden_off=0.2))
    registry = Counting(tmp_path)
    [wanted] = registry.poll()
    with following(registry, budget_bytes=1, retry_s=3600) as made:
        made.start()
        try:
            wait_for(lambda: made.models.aliases() == [wanted])
            for _ in range(3):
                with pytest.raises(Refused, match="golden answers are off"):
                    made.load(Cold(wanted)).result(timeout=20)
                wait_for(lambda: wanted in made.refused)
        finally:
            made.stop()
    assert registry.fetched == 1


def test_the_state_in_mlflow_is_what_the_version_is(store: MLflow, registry_at: Callable[..., MLflowRegistry]) -> None:
    first = store.publish("lamps", export())
    store.client.set_model_version_tag("lamps", first, "size_bytes", "1000")
    with following(registry_at(uri_of(store)), budget_bytes=1) as made:
        made.start()
        try:
            wait_for(lambda: state(store, first).startswith("cold since"))
            made.load(Cold(Wanted("lamps", "champion", first))).result(timeout=20)
            wait_for(lambda: state(store, first).startswith("live since"))
        finally:
            made.stop()
        told = "live since 2001-01-01T00:00:00Z"
        store.client.set_model_version_tag("lamps", first, "serving.state", told)
    with following(registry_at(uri_of(store))) as restarted:
        restarted.look()
        assert state(store, first) == told, "a restart is no promotion"
        second = store.publish("lamps", export(sign=-1))
        restarted.look()
        assert state(store, first).startswith("replaced at")
        assert state(store, first).endswith(f"by version {second}")
        store.client.set_registered_model_alias("lamps", "challenger", second)
        restarted.look()
        assert state(store, second).startswith("live since"), "the champion, though it is on trial too"
    third = store.publish("lamps", export(threshold=0.1))  # while no instance runs
    store.client.set_registered_model_alias("lamps", "challenger", first)
    for _ in range(2):
        with following(registry_at(uri_of(store))) as later:
            later.look()
            assert state(store, first).startswith("on trial since")
            assert state(store, second).startswith("replaced at")
            assert state(store, third).startswith("live since")
    with following(registry_at(uri_of(store))) as later:
        later.look()
        store.publish("other", export())
        store.client.delete_registered_model_alias("lamps", "champion")
        later.look()
        assert "by none" in state(store, third)


def test_a_note_that_could_not_be_written_is_written_later(
    store: MLflow, registry_at: Callable[..., MLflowRegistry]
) -> None:
    version = store.publish("lamps", export())
    with proxy(uri_of(store)) as between, following(registry_at(between.uri)) as made:
        between.lie = Lie(503, path="set-tag")
        made.look()
        assert served(made) == [("lamps", "champion", version)]
        assert state(store, version) == ""
        between.lie = None
        made.look()
        assert state(store, version).startswith("live since")
        assert made._notes.waiting == {}


def test_a_move_there_and_back_and_there_again_is_three_moves(
    store: MLflow, registry_at: Callable[..., MLflowRegistry]
) -> None:
    first = store.publish("lamps", export())
    with following(registry_at(uri_of(store))) as made, following(registry_at(uri_of(store))) as other:
        before = history(store)
        made.look()
        second = store.publish("lamps", export(sign=-1))
        for version in (second, first, second):
            store.client.set_registered_model_alias("lamps", "champion", version)
            made.look()
            other.look()
    moves = [("none", first), (first, second), (second, first), (first, second)]
    assert history(store)[len(before) :][-len(moves) + 1 :] == moves[1:]


@pytest.mark.parametrize("tenant", ["o'brien", 'the "best"'])
def test_the_move_of_a_tenant_whose_name_holds_quotes_is_written_once(
    store: MLflow, registry_at: Callable[..., MLflowRegistry], tenant: str
) -> None:
    version = store.publish(tenant, export())
    with following(registry_at(uri_of(store))) as made:
        made.look()
        assert served(made) == [(tenant, "champion", version)]
    with following(registry_at(uri_of(store))) as restarted:
        restarted.look()
    experiment = store.client.get_experiment_by_name("promotions")
    assert experiment is not None
    told = [run.data.tags for run in store.client.search_runs([experiment.experiment_id])]
    assert [tags["to"] for tags in told if tags["tenant"] == tenant] == [version]
