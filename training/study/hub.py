"""Hugging Face's folders: parquet files named by split, the picture's bytes in a column, class names in the file's metadata."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from training.data.sources import SourceError
from training.study.folders import SPLITS
from training.study.source import Sample, Source, Task

PICTURES, LABELS = ("image", "img", "png", "jpg"), ("label", "fine_label", "labels")


def read(folder: Path, task: Task) -> Source | None:
    """The parquet files below a folder: <split>-00000-of-00001.parquet. A label by name may also stand under a usual one."""
    files = {path: split for path in sorted(folder.rglob("*.parquet")) if (split := _split(path))}
    if not files:
        return None
    schema = pq.read_schema(next(iter(files)))
    columns = schema.names
    picture = next((name for name in PICTURES if name in columns), None)
    label = (
        next((name for name in (task.label, *LABELS) if name in columns), None) if isinstance(task.label, str) else None
    )
    if picture is None or label is None:
        raise SourceError(
            f"{folder}: parquet files with the columns {', '.join(columns)}; a picture ({' or '.join(PICTURES)}) and a label "
            f"({' or '.join(LABELS)}) are expected. A task whose label is derived reads TFDS's and the authors' files."
        )

    def samples() -> Iterator[Sample]:
        for path, split in files.items():
            for batch in pq.ParquetFile(path).iter_batches(256, columns=[picture, label]):
                for fields in batch.to_pylist():
                    held = fields[picture]
                    yield split, int(fields[label]), held["bytes"] if isinstance(held, dict) else held

    told: dict[str, Any] = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    return Source(folder, list(told.get(label, {}).get("names") or task.numbers), samples())


def _split(path: Path) -> str | None:
    found = re.match(r"[a-z]+", path.name)
    return SPLITS.get(found[0]) if found else None
