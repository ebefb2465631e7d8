"""The format of packed datasets, and writing them: tar files in webdataset's layout, index.json and examples.parquet.

    <split>-00000.tar     <key>.jpg or <key>.png beside <key>.json
    index.json            classes, counts, sizes, sha256 of every shard, pack settings
    examples.parquet      key, split, shard, offset, length, labels, width, height, sha256: where each picture lies

Deterministic: the same examples and settings give the same bytes. Reading: training/data/dataset.py.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.errors import UserError

FORMAT = 1
INDEX, EXAMPLES = "index.json", "examples.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("labels", pa.list_(pa.int32())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


class DatasetError(UserError):
    """A dataset that cannot be read as shards; the message says what is missing or damaged."""


@dataclass(frozen=True)
class Example:
    """One picture, ready to be packed. data: JPEG or PNG bytes; suffix: "jpg" or "png"; labels: indices of classes."""

    key: str
    data: bytes
    suffix: str
    labels: tuple[int, ...]
    width: int
    height: int
    sha256: str


class ShardWriter:
    """Writes the shards of one split, a new one whenever `shard_bytes` is reached."""

    def __init__(self, folder: Path, split: str, shard_bytes: int) -> None:
        self.folder, self.split, self.shard_bytes = folder, split, shard_bytes
        self.rows: list[dict[str, Any]] = []
        self.shards: list[dict[str, Any]] = []
        self.tar: tarfile.TarFile | None = None

    def add(self, example: Example) -> None:
        if self.tar is None or self.tar.offset >= self.shard_bytes:
            self.close()
            self.name = f"{self.split}-{len(self.shards):05d}.tar"
            self.count = 0
            self.tar = tarfile.TarFile(self.folder / self.name, "w", format=tarfile.USTAR_FORMAT)
        offset = self.tar.offset + tarfile.BLOCKSIZE
        self._member(f"{example.key}.{example.suffix}", example.data)
        self._member(f"{example.key}.json", json.dumps({"labels": list(example.labels)}).encode())
        self.count += 1
        self.rows.append(
            {
                "key": example.key,
                "split": self.split,
                "shard": self.name,
                "offset": offset,
                "length": len(example.data),
                "labels": list(example.labels),
                "width": example.width,
                "height": example.height,
                "sha256": example.sha256,
            }
        )

    def _member(self, name: str, data: bytes) -> None:
        assert self.tar is not None
        info = tarfile.TarInfo(name)  # mtime, uid and gid stay 0: the bytes depend on the content alone
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        if self.tar is None:
            return
        self.tar.close()
        self.tar = None
        path = self.folder / self.name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
        self.shards.append({"name": self.name, "sha256": digest, "size_bytes": size, "num_examples": self.count})


def write(
    folder: Path,
    examples: Iterable[tuple[str, Example]],
    classes: list[str],
    multi_label: bool,
    shard_bytes: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Writes (split, example) pairs, in their order, as a dataset; returns the index that it also writes."""
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, ShardWriter] = {}
    try:
        for split, example in examples:
            if split not in writers:
                writers[split] = ShardWriter(folder, split, shard_bytes)
            writers[split].add(example)
    finally:
        for writer in writers.values():
            writer.close()
    rows: list[dict[str, Any]] = []
    splits = {}
    for split in sorted(writers):
        writer = writers[split]
        counts = np.bincount([label for row in writer.rows for label in row["labels"]], minlength=len(classes))
        splits[split] = {
            "num_examples": len(writer.rows),
            "class_counts": [int(count) for count in counts],
            "shards": writer.shards,
        }
        rows += writer.rows
    if not rows:
        raise DatasetError("not one picture could be packed; errors.csv beside the shards says why")
    return finish(folder, pa.Table.from_pylist(rows, SCHEMA), splits, classes, multi_label, settings)


def finish(
    folder: Path,
    examples: pa.Table,
    splits: dict[str, Any],
    classes: list[str],
    multi_label: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Writes examples.parquet and index.json beside shards that are there; returns the index."""
    pq.write_table(examples, folder / EXAMPLES)
    widths, heights = examples["width"].to_numpy(), examples["height"].to_numpy()
    index = {
        "format": FORMAT,
        "classes": classes,
        "multi_label": multi_label,
        "splits": splits,
        "sizes": {
            "median_width": int(np.median(widths)),
            "median_height": int(np.median(heights)),
            "max_width": int(widths.max()),
            "max_height": int(heights.max()),
        },
        "examples_sha256": hashlib.sha256((folder / EXAMPLES).read_bytes()).hexdigest(),
        "pack": settings,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index
