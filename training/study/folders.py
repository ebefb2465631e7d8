"""Class folders and tables: what `bit pack` reads, and torchvision's train/ and val/ beside it."""

import csv
from collections.abc import Iterator
from pathlib import Path

from training.data import sources
from training.data.sources import TABLES, Record
from training.study.source import Sample, Source, Task

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def read(folder: Path, _: Task) -> Source | None:
    """<split>/<class>/…, <class>/… or a labels table, at the top or in the only folder that an archive unpacked to."""
    if any((folder / name).is_file() for name in TABLES):
        records = sources.read(folder)
    elif not (records := list(_records(folder))):
        return None
    classes = sorted({label for record in records for label in record.labels})
    number = {label: index for index, label in enumerate(classes)}

    def samples() -> Iterator[Sample]:
        for record in records:
            yield record.split, number[record.labels[0]], record.path.read_bytes()

    return Source(folder, classes, samples(), _answers(folder))


def _answers(folder: Path) -> dict[str, list[int | str]]:
    """mapping.csv with the columns class and answer: which classes of the dataset tuned on are right; a row each."""
    answers: dict[str, list[int | str]] = {}
    if (folder / "mapping.csv").is_file():
        with (folder / "mapping.csv").open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                answers.setdefault(row["class"], []).append(row["answer"])
    return answers


def _records(folder: Path) -> Iterator[Record]:
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    while len(inner) == 1:  # 101_ObjectCategories, 2750, NWPU-RESISC45, …
        inner = [path for path in sorted(inner[0].iterdir()) if path.is_dir()]
    splits = [path for path in inner if path.name in SPLITS]
    for top in splits or (None,):
        for of_class in sorted(path for path in top.iterdir() if path.is_dir()) if top else inner:
            for path in sorted(of_class.rglob("*")):
                if path.suffix.lower() in sources.SUFFIXES and path.is_file():
                    yield Record(path, (of_class.name,), SPLITS[top.name] if top else None)
