"""Shards: every example exactly once, same bytes for same input, readable as plain webdataset tars."""

import gc
import hashlib
import io
import json
import os
import tarfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import dataset as reading
from training.data import shards
from training.data.batches import Stream
from training.data.dataset import Dataset, Split
from training.data.remote import Folder
from training.data.shards import DatasetError, Example


def example(number: int, size: int, label: int) -> Example:
    data = bytes([number % 256]) * size
    return Example(f"{number:08d}", data, "png", (label,), 8, 8, hashlib.sha256(data).hexdigest())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["train", "test"]), st.integers(1, 4000), st.integers(0, 2)), min_size=1, max_size=40
    ),
    st.integers(1, 30_000),
)
def test_every_example_is_read_back_once(tmp_path_factory, drawn, shard_bytes) -> None:
    folder = tmp_path_factory.mktemp("shards")
    written = [(split, example(n, size, label)) for n, (split, size, label) in enumerate(drawn)]
    shards.write(folder, written, ["a", "b", "c"], False, shard_bytes, {})
    dataset = Dataset.open(folder)
    for name in dataset.splits:
        split = dataset.split(name)
        expected = [made for where, made in written if where == name]
        assert split.keys == [made.key for made in expected]
        assert list(split) == [made.data for made in expected]
        assert split.targets().tolist() == [made.labels[0] for made in expected]
        assert sum(told["num_examples"] for told in dataset.index["splits"][name]["shards"]) == len(expected)


def test_shards_are_plain_tars_with_a_label_beside_each_picture(dataset: Dataset) -> None:
    split = dataset.split("train")
    with tarfile.open(Path(dataset.url, split.shard_names[0])) as tar:
        names = tar.getnames()
        assert names[:2] == [f"{split.keys[0]}.png", f"{split.keys[0]}.json"]
        label = tar.extractfile(names[1])
        assert label is not None
        assert json.load(label) == {"labels": [split.labels[0][0]]}


def test_the_index_names_the_hash_of_every_shard(dataset: Dataset) -> None:
    told = dataset.index["splits"]["train"]["shards"]
    assert len(told) > 1
    for shard in told:
        data = Path(dataset.url, shard["name"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard["sha256"], shard["size_bytes"])


def test_a_dataset_is_read_through_fsspec_urls(dataset: Dataset) -> None:
    remote = Dataset.open(f"file://{dataset.url}")
    assert list(remote.split("test")) == list(dataset.split("test"))
    assert remote.fingerprint == dataset.fingerprint


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_more_shards_than_may_be_open_are_read_by_many_threads(tmp_path: Path, scheme: str) -> None:
    count = reading.MAX_OPEN + 20
    written = [("train", example(number, 100 + number, 0)) for number in range(count)]
    shards.write(tmp_path, written, ["a", "b"], False, 1, {})
    split = Dataset.open(f"{scheme}{tmp_path}").split("train")
    assert len(set(split.shards)) == count
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(split.read, range(count))) == [made.data for _, made in written]
    assert len(os.listdir("/proc/self/fd")) <= before + reading.MAX_OPEN
    split.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_several_labels_become_a_multi_hot_matrix(tmp_path: Path) -> None:
    two = Example("00000000", b"x", "png", (0, 2), 8, 8, "0" * 64)
    shards.write(tmp_path, [("train", two)], ["a", "b", "c"], True, 10_000, {})
    assert Dataset.open(tmp_path).split("train").targets().tolist() == [[1.0, 0.0, 1.0]]


def upstream(rows: int, classes: int) -> tuple[Split, list[list[int]]]:
    """A split like ImageNet-21k's: many rows, many classes, one to three labels each, some hundred shards; no pictures."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, rows)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    labels = pa.ListArray.from_arrays(starts, rng.integers(0, classes, starts[-1]).astype(np.int32))
    same = pa.array(["x"]).take(pa.array(np.zeros(rows, np.int64)))
    names = pa.array([f"train-{number:05d}.tar" for number in range(500)]).take(pa.array(np.arange(rows) * 500 // rows))
    numbers = pa.array(np.arange(rows))
    columns = [same, same, names, numbers, numbers, labels, numbers.cast("int32"), numbers.cast("int32"), same]
    table = pa.Table.from_arrays(columns, schema=shards.SCHEMA)
    index = {"classes": [str(number) for number in range(classes)], "multi_label": True, "splits": {}}
    first = [labels[row].as_py() for row in range(100)]
    return Split(Dataset(Folder("nowhere"), index, "0"), "train", table.slice(1)), first[1:]


def test_a_million_pictures_of_thousands_of_classes_take_little_memory() -> None:
    tracemalloc.start()
    try:
        split, labels = upstream(1_000_000, 5_000)
        stream = Stream(split, seed=0, global_batch=256, resize=256, crop=224, flips=True, crops=True)
        first, second = stream.indices(0), stream.indices(4_000)
        targets = split.targets(second)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    assert len({*first, *second}) == 512 - len({*first} & {*second})
    assert targets.shape == (256, 5_000)
    for row, wanted in enumerate(labels):
        assert np.flatnonzero(split.targets(np.array([row]))[0]).tolist() == sorted(set(wanted))
    some = np.array([98, 3, 3, 50])
    assert split.targets(some).sum(1).tolist() == [len(set(labels[row])) for row in some]


@pytest.mark.parametrize("together", [True, False])
def test_splits_share_the_rows_of_the_dataset_where_they_lie_together(tmp_path: Path, together: bool) -> None:
    written = [("train" if number % 3 else "test", example(number, 50 + number, 0)) for number in range(300)]
    index = shards.write(tmp_path, written, ["a", "b"], False, 10**6, {})
    if not together:
        rows = pq.read_table(tmp_path / shards.EXAMPLES)
        rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
        shards.finish(tmp_path, rows, index["splits"], ["a", "b"], False, {})
    data = Dataset.open(tmp_path)
    size = data._examples.nbytes
    gc.collect()  # what other tests left would count against what is taken here
    before = pa.total_allocated_bytes()
    train, test = data.split("train"), data.split("test")
    assert not together or pa.total_allocated_bytes() - before < 0.2 * size
    for name, split in {"train": train, "test": test}.items():
        expected = {made.data for where, made in written if where == name}
        assert (len(split), set(split)) == (len(expected), expected)


class Slow(LocalFileSystem):
    """A store whose answers to parts of files come when five have been asked for."""

    protocol = "slow"
    five: ClassVar = threading.Barrier(5)
    asked: ClassVar[list[int]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        if start is not None and end is not None:
            self.five.wait(timeout=20)
            self.asked.append(end - start)
        return super().cat_file(path, start, end, **kwargs)


def test_shards_of_a_store_are_read_by_many_threads_at_once(tmp_path: Path) -> None:
    written = [("train", example(number, 100 + number, 0)) for number in range(50)]
    shards.write(tmp_path, written, ["a", "b"], False, 2_000, {})
    fsspec.register_implementation("slow", Slow, clobber=True)
    split = Dataset.open(f"slow://{tmp_path}").split("train")
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(split.read, range(50))) == [made.data for _, made in written]
    assert sorted(Slow.asked) == list(range(100, 150))


def test_damage_is_noticed(dataset: Dataset, tmp_path: Path) -> None:
    for name in (shards.INDEX, shards.EXAMPLES):
        (tmp_path / name).write_bytes(Path(dataset.url, name).read_bytes())
    (tmp_path / shards.EXAMPLES).write_bytes(io.BytesIO(b"other").getvalue())
    with pytest.raises(DatasetError, match="damaged"):
        Dataset.open(tmp_path).split("train")
    with pytest.raises(DatasetError, match="not a packed dataset"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="Choices: test, train"):
        dataset.split("val")
