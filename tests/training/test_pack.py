"""Packing: deterministic, and never stopped by one bad picture."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import draw_folder
from training.config import PackConfig
from training.data.dataset import Dataset
from training.pack import ERRORS, PackError, pack


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_pictures_give_the_same_bytes_however_many_processes_work(tmp_path: Path) -> None:
    source = draw_folder(tmp_path / "in", train=90, test=90, side=6)  # enough files for the processes to be used
    pack(source, tmp_path / "one", PackConfig(), processes=1)
    pack(source, tmp_path / "two", PackConfig(), processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_duplicates_never_straddle_splits(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for number in range(40):
        for name in ("a", "b"):
            folder = tmp_path / "in" / name
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(3):
                (folder / f"{number}-{copy}.png").write_bytes(picture(10 + number, 9))
    pack(tmp_path / "in", tmp_path / "out", PackConfig(splits={"train": 0.5, "test": 0.5}), processes=1)
    dataset = Dataset.open(tmp_path / "out")
    train, test = set(dataset.split("train").sha256), set(dataset.split("test").sha256)
    assert train
    assert test
    assert not train & test


def test_a_bad_picture_lands_in_the_report_with_its_reason(tmp_path: Path) -> None:
    source = draw_folder(tmp_path / "in")
    (source / "train" / "class-0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (source / "train" / "class-1" / "text.jpg").write_text("not a picture")
    (source / "train" / "class-1" / "empty.jpg").write_bytes(b"")
    index, failures = pack(source, tmp_path / "out", PackConfig(), processes=1)
    assert index["splits"]["train"]["num_examples"] == 36
    assert sorted(Path(path).name for path, _ in failures) == ["bad.png", "empty.jpg", "text.jpg"]
    with (tmp_path / "out" / ERRORS).open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["reason"] for row in rows)
    with pytest.raises(PackError, match=r"pack\.strict"):
        pack(source, tmp_path / "strict", PackConfig(strict=True), processes=1)


def test_other_kinds_become_png_and_jpeg_stays_byte_for_byte(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for name, suffix in (("a", ".jpg"), ("b", ".bmp"), ("c", ".webp")):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"1{suffix}").write_bytes(picture(20, 20, suffix))
    pack(tmp_path / "in", tmp_path / "out", PackConfig(splits={"train": 1.0}), processes=1)
    first, second, third = Dataset.open(tmp_path / "out").split("train")
    assert first == picture(20, 20, ".jpg")
    assert second[:4] == third[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "file,label\n1.png,a\n", "no column 'path'; found file, label"),
        ("t.csv", "path,klass\n1.png,a\n", "label or labels"),
        ("t.csv", "path,label\n1.png,\n", "no label for '1.png'"),
        ("t.csv", "path,label\n../../etc/passwd,a\n", "lies outside"),
        ("t.csv", "path,label,split\n1.png,a,../../escaped\n", r"row 1: split '\.\./\.\./escaped'"),
        ("t.jsonl", "{broken\n", "row 1: not JSON"),
        ("t.csv", "path,label\n1.png,a\n", "at least two classes"),
        ("t.txt", "", "neither a folder nor"),
    ],
)
def test_a_table_that_cannot_be_packed_says_why(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PackError, match=said):
        pack(tmp_path / name, tmp_path / "out", PackConfig(), processes=1)


def test_tables_carry_several_labels_and_splits(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(12 + number, 12))
    (tmp_path / "labels.csv").write_text("path,labels,split\n0.png,a|b,train\n1.png,b,train\n2.png,c,test\n")
    pack(tmp_path, tmp_path / "out", PackConfig(), processes=1)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.multi_label
    assert dataset.split("train").labels == [[0, 1], [1]]
    with pytest.raises(PackError, match="multi_label: true"):
        pack(tmp_path, tmp_path / "out", PackConfig(multi_label=False), processes=1)


def test_nothing_readable_is_an_error_not_an_empty_dataset(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(b"no")
    with pytest.raises(PackError, match="not one picture"):
        pack(tmp_path / "in", tmp_path / "out", PackConfig(), processes=1)
