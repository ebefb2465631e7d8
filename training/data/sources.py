"""Where pictures come from: a folder of class folders, or a CSV/JSONL of path and label(s). Both end as records."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TABLES = ("labels.csv", "labels.jsonl")
SPLITS = ("train", "validation", "test")


class SourceError(UserError):
    """A source that cannot be packed; the message names the place, what is wrong and what is expected."""


@dataclass(frozen=True)
class Record:
    """One picture file. labels: names of its classes; split: None where the source leaves it to the hash of the content."""

    path: Path
    labels: tuple[str, ...]
    split: str | None = None


def read(source: Path) -> list[Record]:
    """All records of a source, in the order of their paths. Raises SourceError."""
    if source.is_dir():
        table = next((source / name for name in TABLES if (source / name).is_file()), None)
        records = list(_table(table) if table else _folder(source))
    elif source.is_file():
        records = list(_table(source))
    else:
        raise SourceError(f"{source} is not there. Give a folder of class folders, a CSV or a JSONL (pack.source).")
    classes = {label for record in records for label in record.labels}
    if len(classes) < 2:
        raise SourceError(
            f"{source} holds {len(records)} pictures of {len(classes)} classes {sorted(classes)}; at least two classes are "
            "needed: one folder per class, as in pictures/cat/1.jpg, pictures/dog/1.jpg."
        )
    return sorted(records, key=lambda record: (record.path.as_posix(), record.labels))


def _folder(root: Path) -> Iterator[Record]:
    """<class>/…/picture, or <split>/<class>/…/picture where every folder at the top is named like a split."""
    tops = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    with_splits = bool(tops) and all(path.name in SPLITS for path in tops)
    for top in tops:
        for folder in [path for path in sorted(top.iterdir()) if path.is_dir()] if with_splits else [top]:
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    yield Record(path, (folder.name,), top.name if with_splits else None)


def _table(path: Path) -> Iterator[Record]:
    root = path.parent.resolve()
    for number, row in enumerate(_rows(path), 1):
        place = f"{path}, row {number}"
        if missing := {"path"} - row.keys() or ({"label or labels"} if not row.keys() & {"label", "labels"} else set()):
            found = ", ".join(map(str, row))
            raise SourceError(
                f"{place}: no column {missing.pop()!r}; found {found}. Expected: path, label or labels[, split]."
            )
        labels = _labels(row)
        if not labels:
            raise SourceError(f"{place}: no label for {row['path']!r}.")
        picture = (root / str(row["path"])).resolve()
        if not picture.is_relative_to(root):
            raise SourceError(
                f"{place}: {row['path']!r} lies outside {path.parent}; only pictures beneath it are read."
            )
        split = str(row.get("split") or "")
        if not re.fullmatch(r"[\w-]*", split):  # it becomes the name of a file
            raise SourceError(f"{place}: split {split!r}: letters, digits, _ and - only, as in {', '.join(SPLITS)}.")
        yield Record(path.parent / picture.relative_to(root), labels, split or None)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{path}, row {number}: not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise SourceError(f"{path}, row {number}: a JSON object is expected, found {line[:40]!r}.")
            yield row
    else:
        raise SourceError(f"{path} is neither a folder nor .csv nor .jsonl.")


def _labels(row: dict[str, Any]) -> tuple[str, ...]:
    """`labels` is a list in JSONL and a text separated by `|` in CSV; `label` is one name."""
    given = row.get("labels") if row.get("labels") is not None else row.get("label")
    parts = given if isinstance(given, list) else str(given or "").split("|") if "labels" in row else [given]
    return tuple(sorted({str(part).strip() for part in parts if str(part or "").strip()}))
