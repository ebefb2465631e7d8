"""Shards: every example exactly once, same bytes for same input, readable as plain webdataset tars."""

import hashlib
import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import dataset as reading
from training.data import shards
from training.data.dataset import Dataset
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
