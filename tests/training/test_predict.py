"""Batch answers: every source, the same answers as the export gives, kills, damaged pictures, slices."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs

from tests import s3
from tests.conftest import encode
from tests.services.exports import CLASSES, export
from training import predict
from training.config import Config, ConfigError
from training.data import pictures
from training.data.dataset import Dataset
from training.data.sources import SourceError
from training.errors import OutageError, UserError

COUNT = 60
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey pictures of rising brightness, one damaged, one empty, one file that is no picture."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        path = root / f"{number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(np.full((20, 20, 3), number * 4, np.uint8)))
    (root / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    (root / "empty.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("not a picture")
    return root


def answered(path: Path) -> dict[str, dict]:
    return {row["picture"]: row for row in pq.read_table(path).to_pylist()}


def test_every_picture_is_answered_and_errors_are_kept(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    assert predict.main("lamps", predict.Export(export(), "7"), str(folder), str(out), 2, 2) == (COUNT + 2, 2)
    rows = answered(out)
    assert rows["0/000.png"]["class"] == CLASSES[0]
    assert rows["2/059.png"]["class"] == CLASSES[1]
    assert rows["2/059.png"]["probabilities"][0] == pytest.approx(rows["2/059.png"]["probability"])
    assert sorted(rows["2/059.png"]["classes"]) == sorted(CLASSES)
    assert "not a picture: 0 bytes" in rows["empty.jpg"]["error"]
    assert rows["damaged.png"]["class"] is None
    assert pq.read_schema(out).metadata[b"version"] == b'"7"'
    assert not Path(f"{out}.parts").exists()


def test_a_table_a_url_shards_and_a_single_picture_are_sources(folder: Path, tmp_path: Path, dataset: Dataset) -> None:
    (folder / "list.csv").write_text("path,note\n1/001.png,a\n1/004.png,b\nmissing.png,c\n")
    of_table = pictures.find(str(folder / "list.csv"))
    assert list(of_table.names) == ["1/001.png", "1/004.png", "missing.png"]
    assert of_table.read(1) == (folder / "1/004.png").read_bytes()
    assert (
        predict.main("lamps", predict.Export(export(), "1"), str(folder / "list.csv"), f"{tmp_path}/a.parquet", 1, 1)[1]
        == 1
    )
    assert list(pictures.find(folder.as_uri()).names) == list(pictures.find(str(folder)).names)
    assert len(pictures.find(str(folder / "1/001.png"))) == 1
    packed = pictures.find(dataset.url)
    assert len(packed) == sum(len(dataset.split(name)) for name in dataset.splits)
    assert packed.read(0) == dataset.split(dataset.splits[0]).read(0)


@pytest.mark.parametrize("source", ["nowhere", "nowhere.csv", "odd://x"])
def test_a_source_that_cannot_be_read_says_what_can(source: str) -> None:
    with pytest.raises(SourceError, match="Give a folder"):
        pictures.find(source)


@pytest.mark.parametrize("slices", [1, 3, 7, 100])
def test_slices_hold_every_picture_once(slices: int) -> None:
    whole = pictures.Pictures([str(n) for n in range(23)], lambda i: b"%d" % i)
    cut = [whole.cut(index, slices) for index in range(slices)]
    assert [name for one in cut for name in one.names] == list(whole.names)
    assert [one.read(i) for one in cut for i in range(len(one))] == [whole.read(i) for i in range(23)]


@pytest.mark.parametrize(
    ("out", "slice_of_it"),
    [("answers.parquet", "answers-00001-of-00003.parquet"), ("v1.2/answers", "v1.2/answers-00001-of-00003")],
)
def test_a_slice_is_named_after_the_result(folder: Path, tmp_path: Path, out: str, slice_of_it: str) -> None:
    lamps = predict.Export(export(), "7")
    predict.main("lamps", lamps, str(folder / "1/001.png"), str(tmp_path / out), 1, 1, 1, 3)
    assert (tmp_path / slice_of_it).is_file()


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    many = tmp_path / "many.csv"
    (tmp_path / "grey.png").write_bytes(encode(np.full((20, 20, 3), 90, np.uint8)))
    many.write_text("path\n" + "grey.png\n" * (6 * predict.PART * predict.BATCH))
    (tmp_path / "lamps.onnx").write_bytes(export(mflop=3))
    command = [sys.executable, "-m", "training", "predict", "lamps", str(many), "--models", str(tmp_path), "--out"]
    killed = tmp_path / "killed.parquet"
    child = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
    first = Path(f"{killed}.parts/000000.parquet")
    until = time.monotonic() + 60
    while not first.exists():
        assert child.poll() is None, "ended before its first part"
        assert time.monotonic() < until
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    made = first.stat().st_mtime_ns
    assert not killed.exists()
    with pytest.raises(ConfigError, match="Delete that folder"):
        predict.main("lamps", predict.Export(export(sign=-1), "2"), str(many), str(killed), 5, 2)
    assert first.stat().st_mtime_ns == made
    # Whatever lay in the parts that were finished is taken as it is: the second run does not ask again.
    done = subprocess.run([*command, str(killed)], check=True, capture_output=True, text=True)
    assert f"\n{predict.PART * predict.BATCH:,} of" not in f"\n{done.stdout}", "the first part was made again"
    whole = tmp_path / "whole.parquet"
    predict.main("lamps", predict.read_export(tmp_path, "lamps"), str(many), str(whole), 5, 2)
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "row", ["odd://x/y.png", "http://127.0.0.1:9/x.png", "", "note"], ids=["protocol", "http", "blank", "short"]
)
def test_a_picture_that_cannot_be_had_is_one_error(folder: Path, tmp_path: Path, row: str) -> None:
    lines = {"": 'a,""', "note": "a"}.get(row, f"a,{row}")
    (folder / "odd.csv").write_text(f"note,path\na,1/001.png\n{lines}\na,1/004.png\n")
    out = f"{tmp_path}/a.parquet"
    assert predict.main("lamps", predict.Export(export(), "1"), str(folder / "odd.csv"), out, 1, 1) == (3, 1)
    assert [row["error"] is None for row in pq.read_table(out).to_pylist()] == [True, False, True]


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that has only errors; HEAD says that everything is there where the status is a server's fault."""

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def do_HEAD(self) -> None:
            self.send_response(200 if status >= 500 else status)
            self.send_header("Content-Length", "100")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [500, 404, None], ids=["fault", "missing", "refused"])
def test_the_error_of_a_picture_on_a_server_says_why(folder: Path, tmp_path: Path, status: int | None) -> None:
    with answering(status) if status else nullcontext("http://127.0.0.1:9") as url:
        (folder / "web.csv").write_text(f"path\n{url}/x.png\n1/004.png\n")
        out = f"{tmp_path}/a.parquet"
        assert predict.main("lamps", predict.Export(export(), "1"), str(folder / "web.csv"), out, 1, 1) == (2, 1)
    [error] = [row["error"] for row in pq.read_table(out).to_pylist() if row["error"]]
    assert (f"{status}, message=" if status else "Cannot connect") in error


@pytest.mark.parametrize("name", ["", "/pictures/", "/list.csv", "/x.png"])
@pytest.mark.parametrize(("status", "ends_with"), [(None, 1), (503, 1), (429, 1), (404, 2), (403, 2)])
def test_a_server_that_is_away_may_be_asked_again_and_one_that_refuses_may_not(
    name: str, status: int | None, ends_with: int
) -> None:
    with (
        answering(status) if status else nullcontext("http://127.0.0.1:9") as url,
        pytest.raises(UserError, match=f"{status}, message=|not found" if status else "Cannot connect") as raised,
    ):
        pictures.find(url + name)
    assert raised.value.status == ends_with
    assert ("Start the same command again" in str(raised.value)) == (ends_with == 1)
    assert ("Give a folder" in str(raised.value)) == (ends_with == 2)


def test_a_store_that_is_away_may_be_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    lamps = predict.Export(export(), "1")
    with pytest.raises(OutageError, match=r"s3://bucket/pictures does not answer"):
        pictures.find("s3://bucket/pictures")
    with pytest.raises(OutageError, match=r"s3://bucket/a\.parquet does not answer"):
        predict.main("lamps", lamps, str(folder), "s3://bucket/a.parquet", 1, 1)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_table_that_is_none_is_not_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "odd.csv").write_bytes(b'path\n"' + b"x" * 200_000 + b'"\n')
    with pytest.raises(SourceError, match="field larger than"):
        pictures.find(str(tmp_path / "odd.csv"))


def test_the_command_ends_with_status_1_and_one_line_where_nobody_answers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lamps.onnx").write_bytes(export())
    (tmp_path / "params.yaml").write_text("tracking_uri: http://127.0.0.1:9\n")
    command = [sys.executable, "-m", "training", "predict", "lamps", "--out", "a.parquet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    for more in (["http://127.0.0.1:9/pictures", "--models", "."], [str(folder)]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert line.startswith("bit: ")
        assert "Start the same command again" in line


def test_an_out_that_cannot_be_written_is_refused_before_work_begins(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    lamps = predict.Export(export(), "1")
    with pytest.raises(ConfigError, match=r"is a folder\. Name a file in it"):
        predict.main("lamps", lamps, str(folder), str(tmp_path), 1, 1)
    assert not Path(f"{tmp_path}.parts").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        predict.main("lamps", lamps, str(folder), f"{tmp_path}/file/a.parquet", 1, 1)


def test_parts_that_a_kill_left_without_their_plan_are_not_taken(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    left = predict.Parts(str(out), {"sha256": "of another version"})
    left.add([{"picture": "0/000.png", "class": "stale"}])
    Path(f"{out}.parts/plan.json").unlink()
    predict.main("lamps", predict.Export(export(), "7"), str(folder), str(out), 2, 2)
    assert answered(out)["0/000.png"]["class"] == CLASSES[0]


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3.serving(f"answers-{uuid4().hex}") as url:  # moto forgets none while the process lives
        yield url


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_slices_that_start_at_once_agree_on_a_version(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if store == "disk" else request.getfixturevalue("bucket")
    for number in range(5):
        start = threading.Barrier(8)

        def slice_of_it(version: str, run: str = str(number), start: threading.Barrier = start) -> str:
            start.wait()
            return predict.pin(f"{root}/answers.parquet", run, version)

        with ThreadPoolExecutor(8) as pool:
            agreed = set(pool.map(slice_of_it, map(str, range(8))))
        assert len(agreed) == 1
        assert predict.pin(f"{root}/answers.parquet", str(number), "later") in agreed
    assert not list(tmp_path.glob("*.tmp"))


def test_an_export_that_is_damaged_is_not_asked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="golden answers are off"):
        predict.main("lamps", predict.Export(export(golden_off=0.2), "3"), str(folder), f"{tmp_path}/a.parquet", 1, 1)


def draw(folder: Path, brightness: int, count: int = 3) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encode(np.full((20, 20, 3), brightness, np.uint8)))
    return str(folder)


def leave(source: str, out: str) -> None:
    """What a run leaves that was killed when its first part, of 2,048 pictures, was finished."""
    plan = predict.plan_of(predict.Export(export(), "1"), source, pictures.find(source), 1)
    predict.Parts(out, plan).add([{"picture": "0.png", "class": "of the first run"}])


def test_an_unfinished_run_is_not_continued_over_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lamps, out = predict.Export(export(), "1"), str(tmp_path / "answers.parquet")
    dark, bright = draw(tmp_path / "dark", 10), draw(tmp_path / "bright", 240)
    for path in Path(bright).iterdir():  # nothing but the folder's name tells them apart
        shutil.copystat(path, Path(dark, path.name))
    leave(dark, out)
    with pytest.raises(ConfigError, match=r"unfinished run over other pictures[\s\S]*Delete that folder"):
        predict.main("lamps", lamps, bright, out, 1, 1)
    monkeypatch.chdir(tmp_path)
    predict.main("lamps", lamps, "dark/", out, 1, 1)
    assert answered(Path(out))["0.png"]["class"] == "of the first run", "the same folder, named from elsewhere"


@pytest.mark.parametrize("kind", ["folder", "table", "s3"])
def test_an_unfinished_run_is_not_continued_over_pictures_that_were_replaced(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    lamps, out = predict.Export(export(), "1"), str(tmp_path / "answers.parquet")
    source = folder = draw(tmp_path / "pictures", 10)
    if kind == "table":
        source = str(tmp_path / "list.csv")
        Path(source).write_text("path\npictures/0.png\npictures/1.png\n")
    elif kind == "s3":
        source = f"{request.getfixturevalue('bucket')}/pictures"

    def deliver() -> None:
        """The pictures as they are now; each run is a process that has listed nothing yet."""
        s3fs.S3FileSystem.clear_instance_cache()
        if kind == "s3":
            for path in Path(folder).iterdir():
                s3fs.S3FileSystem().pipe_file(f"{source}/{path.name}", path.read_bytes())
            s3fs.S3FileSystem.clear_instance_cache()

    deliver()
    leave(source, out)
    draw(Path(folder), 11)
    deliver()
    with pytest.raises(ConfigError, match="changed since"):
        predict.main("lamps", lamps, source, out, 1, 1)
    shutil.rmtree(f"{out}.parts")
    leave(source, out)
    deliver()  # to a store: the same bytes once more
    predict.main("lamps", lamps, source, out, 1, 1)
    assert answered(Path(out))["0.png"]["class"] == "of the first run"


def test_shards_are_known_by_their_index(dataset: Dataset) -> None:
    packed = pictures.find(dataset.url)
    assert packed.cut(1, 3).mark(0) == dataset.fingerprint
    assert packed.fingerprint() != pictures.Pictures(packed.names, packed.read).fingerprint()


@pytest.mark.parametrize(("status", "ends_with"), [(503, 1), (401, 2)])
def test_an_mlflow_that_is_away_may_be_asked_again_and_one_that_refuses_may_not(
    status: int, ends_with: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with answering(status) as url, pytest.raises(UserError, match=url) as raised:
        predict.find_export(Config(tracking_uri=url), "lamps", None, "champion")
    assert raised.value.status == ends_with
    assert "\n" not in str(raised.value).strip()
