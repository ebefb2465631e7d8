"""Every reader on a tiny real layout: each picture carries its label, and the packed dataset must agree with it."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services import preprocess
from tests.training.study import layouts
from training.config import ConfigError
from training.data.dataset import Dataset
from training.data.sources import SourceError
from training.study import tfds
from training.study.datasets import DATASETS, VTAB, opened
from training.study.measure import mapping

Written = Callable[[Path], None]
ON_DISK: dict[str, tuple[str, Written, dict[str, int]]] = {
    "cifar10 binary": ("cifar10", layouts.cifar10_binary, {"train": 50, "test": 10}),
    "cifar10 torchvision": ("cifar10", layouts.cifar10_python, {"train": 50, "test": 10}),
    "cifar10 hub": ("cifar10", partial(layouts.hub, classes=10, picture="img"), {"train": 20, "test": 10}),
    "cifar100 binary": ("cifar100", layouts.cifar100_binary, {"train": 100, "test": 100}),
    "cifar100 torchvision": ("cifar100", layouts.cifar100_python, {"train": 100, "test": 100}),
    "cifar100 hub": (
        "cifar100",
        partial(layouts.hub, classes=100, picture="img", label="fine_label"),
        {"train": 200, "test": 100},
    ),
    "camelyon hub": ("camelyon", partial(layouts.hub, classes=2, names=False), {"train": 4, "test": 2}),
    "svhn": ("svhn", layouts.svhn, {"train": 20, "test": 10}),
    "flowers": ("flowers", layouts.flowers, {"train": 102, "validation": 102, "test": 102}),
    "pets": ("pets", layouts.pets, {"train": 74, "test": 37}),
    "dtd": ("dtd", layouts.dtd, {"train": 47, "validation": 47, "test": 47}),
    "ilsvrc": ("ilsvrc", partial(layouts.folders, classes=1000), {"train": 2000, "test": 1000}),
    "objectnet": ("objectnet", layouts.objectnet, {"test": 313}),
    "eurosat": ("eurosat", partial(layouts.folders, classes=10, splits=(), inner="2750"), {}),
    "resisc45": ("resisc45", partial(layouts.folders, classes=45, splits=(), inner="NWPU-RESISC45"), {}),
    "caltech101": (
        "caltech101",
        partial(layouts.folders, classes=102, splits=(), inner="caltech/101_ObjectCategories"),
        {},
    ),
    "sun397": ("sun397", partial(layouts.folders, classes=397, splits=("train", "test")), {"train": 794, "test": 397}),
    "retinopathy": ("retinopathy", layouts.retinopathy, {}),
    "clevr": ("clevr-count", layouts.clevr, {"train": 8, "test": 8}),
    "kitti": ("kitti-distance", layouts.kitti, {}),
    "smallnorb": ("smallnorb-azimuth", layouts.smallnorb, {"train": 162, "test": 162}),
}


def labels_carried(data: Dataset) -> tuple[list[int], list[int]]:
    """(labels as packed, labels that the pictures carry)"""
    packed, told = [], []
    for name in data.splits:
        split = data.split(name)
        packed += split.targets().tolist()
        told += [layouts.carried(preprocess.decode(picture)) for picture in split]
    return packed, told


@pytest.mark.parametrize("layout", ON_DISK)
def test_a_layout_is_read_with_every_label_at_its_picture(layout: str, tmp_path: Path) -> None:
    name, write, counts = ON_DISK[layout]
    write(tmp_path / (DATASETS[name].folder or name))
    data = opened(name, tmp_path)
    packed, told = labels_carried(data)
    assert packed == told
    assert len(data.classes) == DATASETS[name].classes
    assert not counts or {split: len(data.split(split)) for split in data.splits} == counts
    assert "test" in data.splits or len(packed) < 10
    assert opened(name, tmp_path).fingerprint == data.fingerprint  # packed once


def derived(name: str, label: int) -> dict[str, list[Any]]:
    """The fields by which TFDS tells the label of a task."""
    kinds: dict[str, dict[str, list[Any]]] = {
        "clevr-count": {"objects/size": [0] * (label + 3), "objects/pixel_coords": [1.0, 2.0, 9.0] * (label + 3)},
        "clevr-distance": {
            "objects/size": [0],
            "objects/pixel_coords": [1.0, 2.0, (7.0, 8.2, 8.7, 9.2, 9.7, 30.0)[label % 6]],
        },
        "kitti-distance": {
            "objects/type": [0, 5] if label < 3 else [5, 5],
            "objects/location": [1.0, 2.0, (5.0, 15.0, 50.0, 1.0)[label % 4], 1.0, 2.0, 3.0],
        },
        "dsprites-location": {"label_x_position": [2 * label + 1], "label_orientation": [0]},
        "dsprites-orientation": {"label_x_position": [0], "label_orientation": [int(2.5 * label + 0.5)]},
        "smallnorb-azimuth": {"label_azimuth": [label], "label_elevation": [0]},
        "smallnorb-elevation": {"label_azimuth": [0], "label_elevation": [label]},
    }
    return kinds.get(name, {"label": [label]})


@pytest.mark.parametrize("name", [name for name, row in DATASETS.items() if row.tfds])
def test_tfds_layout_is_read(name: str, tmp_path: Path) -> None:
    row = DATASETS[name]
    label = row.label if isinstance(row.label, str) else "."
    layouts.tfds(tmp_path / (row.folder or name), row.tfds, row.classes, partial(derived, name), label, row.test)
    data = opened(name, tmp_path)
    assert [len(data.split(split)) for split in ("train", "test")] == [2 * row.classes, row.classes]
    packed, told = labels_carried(data)
    assert packed == [label for split, label in sorted(layouts.examples(row.classes))] or row.black_and_white
    if not row.black_and_white:
        assert packed == told
        assert data.classes[-1] == (f"name{row.classes - 1}" if isinstance(row.label, str) else str(row.classes - 1))


def test_dsprites_are_black_and_white_and_its_pickle_is_never_read(tmp_path: Path) -> None:
    layouts.dsprites(tmp_path / "dsprites")
    for name, row in (("dsprites-location", 0), ("dsprites-orientation", 1)):
        data = opened(name, tmp_path)
        for split in (data.split(split) for split in data.splits):
            for picture, label in zip(split, split.targets(), strict=True):
                pixels = preprocess.decode(picture)
                assert set(np.unique(pixels)) == {0, 255}
                assert (pixels[row, :, 0] == 255).sum() == label + 1


def test_elevation_and_distance_are_other_tasks_on_the_same_files(tmp_path: Path) -> None:
    layouts.smallnorb(tmp_path / "smallnorb")
    layouts.clevr(tmp_path / "clevr")
    elevation = opened("smallnorb-elevation", tmp_path).split("train").targets()
    assert elevation.tolist() == list(range(9)) * 18
    assert opened("clevr-distance", tmp_path).split("test").targets().tolist() == [0, 1, 2, 3, 4, 5, 5, 5]


def test_objectnets_frame_is_cut_off_and_its_mapping_kept(tmp_path: Path) -> None:
    layouts.objectnet(tmp_path / "objectnet")
    data = opened("objectnet", tmp_path)
    assert data.index["pack"]["answers"] == {"folder000": [5], "folder001": [6, 7], "folder002": [8]}
    assert preprocess.decode(data.split("test").read(0)).shape == (16, 16, 3)


def test_a_mapping_of_ones_own_is_a_table_beside_the_folders(tmp_path: Path) -> None:
    layouts.folders(tmp_path / "objectnet", 313, splits=("test",))
    table = tmp_path / "objectnet" / "mapping.csv"
    table.write_text("class,answer\nn00000001,cat\nn00000001,lynx\nn00000004,dog\n")
    data = opened("objectnet", tmp_path)
    assert mapping(data, ["bird", "cat", "dog", "lynx"]) == {1: {1, 3}, 4: {2}}
    with pytest.raises(ConfigError, match="the mapping of 'n00000001' names 'lynx', which was not tuned on"):
        mapping(data, ["bird", "cat", "dog"])
    layouts.folders(tmp_path / "bare" / "objectnet", 313, splits=("test",))
    with pytest.raises(ConfigError, match=r"maps none of its classes; give a mapping.csv"):
        mapping(opened("objectnet", tmp_path / "bare"), ["bird"])


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    layouts.cifar10_python(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(SourceError, match=r"only arrays are read. Get the binary version"):
        opened("cifar10", tmp_path)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "packed" / "cifar10").exists()


def test_files_that_are_cut_short_or_incomplete_are_refused(tmp_path: Path) -> None:
    layouts.cifar10_binary(tmp_path / "cifar10")
    cut = tmp_path / "cifar10" / "cifar-10-batches-bin" / "test_batch.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(SourceError, match="cut short"):
        opened("cifar10", tmp_path)
    layouts.tfds(tmp_path / "dmlab", "dmlab", 6, lambda label: {"label": [label]})
    record = next((tmp_path / "dmlab").rglob("*train.tfrecord*"))
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(SourceError, match="cut short"):
        opened("dmlab", tmp_path)
    layouts.folders(tmp_path / "eurosat", 9, splits=())
    with pytest.raises(ConfigError, match=r"holds 9 classes, eurosat has 10. Is it complete\?"):
        opened("eurosat", tmp_path)


def test_an_example_of_negative_numbers_and_floats_is_parsed_as_protocol_buffers_wrote_it() -> None:
    message = layouts.example_class()()
    told = {"a": [-3, 2**40, 0], "b": [0.5, -1.25], "c": [b"\x00x", b""], "d": [7]}
    for key, values in told.items():
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(message.features.feature[key], kind).value.extend(values)
    assert tfds.parse(message.SerializeToString()) == told


def test_absent_data_says_what_to_get_and_where_to_put_it(tmp_path: Path) -> None:
    assert len(VTAB) == len(set(VTAB)) == 19
    assert set(VTAB) | {"ilsvrc", "cifar10", "objectnet"} == {
        name for name, row in DATASETS.items() if row.group != "demo"
    }
    for name, row in DATASETS.items():
        if row.group != "demo":
            with pytest.raises(ConfigError) as told:
                opened(name, tmp_path)
            assert str(tmp_path / (row.folder or name)) in str(told.value)
            assert row.get in str(told.value)
    with pytest.raises(ConfigError, match="Choices: digits, textures"):
        opened("pest", tmp_path)
    (tmp_path / "pets.dvc").write_text("outs: []\n")
    with pytest.raises(ConfigError, match=r"tracked by DVC and not here: run `dvc pull .*pets.dvc`"):
        opened("pets", tmp_path)


def test_the_demos_rows_need_no_folder(tmp_path: Path) -> None:
    digits, textures = opened("digits", tmp_path), opened("textures", tmp_path)
    assert (len(digits.split("train")), len(digits.split("test"))) == (898, 899)
    assert np.bincount(textures.split("train").targets()).tolist() == [100, 100, 100]
