"""Datasets as shards: tar files in webdataset's layout, index.json and examples.parquet; written once, read at random.

    <split>-00000.tar     <key>.jpg or <key>.png beside <key>.json
    index.json            classes, counts, sizes, sha256 of every shard, pack settings
    examples.parquet      key, split, shard, offset, length, labels, width, height, sha256: where each picture lies

Deterministic: the same examples and settings give the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.data.remote import Folder
from training.errors import UserError

FORMAT = 1
MAX_OPEN = 64  # shards of a split: most systems allow a process 1,024 files, some 256
INDEX, EXAMPLES = "index.json", "examples.parquet"


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


class Dataset:
    """A packed dataset: a local folder, any fsspec URL or a folder of a DVC remote. Build it with `Dataset.open`."""

    def __init__(self, folder: Folder, index: dict[str, Any], fingerprint: str) -> None:
        self.folder, self.url, self.index, self.fingerprint = folder, folder.url, index, fingerprint
        self.classes: list[str] = index["classes"]
        self.multi_label: bool = index["multi_label"]

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Self:
        """Reads index.json. fingerprint: its sha256, which stands for every byte of the dataset. Raises DatasetError."""
        url = os.fspath(url)
        folder = Folder(url)
        try:
            data = folder.read(INDEX)
            index = json.loads(data)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{url} is not a packed dataset: {INDEX} cannot be read ({error}). Run `bit pack`."
            ) from error
        if index.get("format") != FORMAT:
            raise DatasetError(
                f"{url} has format {index.get('format')!r}, this code reads {FORMAT}. Run `bit pack` again."
            )
        return cls(folder, index, hashlib.sha256(data).hexdigest())

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def splits(self) -> list[str]:
        return list(self.index["splits"])

    @cached_property
    def _examples(self) -> pa.Table:
        data = self.folder.read(EXAMPLES)
        if hashlib.sha256(data).hexdigest() != self.index["examples_sha256"]:
            raise DatasetError(
                f"{self.url}/{EXAMPLES} does not match {INDEX}: one of them is damaged. Run `bit pack` again."
            )
        return pq.read_table(io.BytesIO(data))

    def split(self, name: str) -> "Split":
        """Raises DatasetError for a split that the dataset lacks."""
        if name not in self.splits:
            raise DatasetError(f"{self.url} has no split {name!r}. Choices: {', '.join(self.splits)}.")
        table = self._examples
        return Split(self, name, table.filter(pa.compute.equal(table["split"], name)))


class Split:
    """One split's examples, in the order in which they lie in the shards."""

    def __init__(self, dataset: Dataset, name: str, table: pa.Table) -> None:
        self.dataset, self.name = dataset, name
        self.keys: list[str] = table["key"].to_pylist()
        self.sha256: list[str] = table["sha256"].to_pylist()
        self.shards: list[str] = table["shard"].to_pylist()
        self.labels: list[list[int]] = table["labels"].to_pylist()
        self.widths: NDArray[np.int32] = table["width"].to_numpy()
        self.heights: NDArray[np.int32] = table["height"].to_numpy()
        self._offsets, self._lengths = table["offset"].to_pylist(), table["length"].to_pylist()
        self._files: dict[str, Any] = {}  # that which was used last comes last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[bytes]:
        return (self.read(i) for i in range(len(self)))

    def targets(self) -> NDArray[Any]:
        """int64 [n] class indices, or float32 [n, C] with a 1 for each label where pictures have several."""
        if not self.dataset.multi_label:
            return np.array([labels[0] for labels in self.labels], dtype=np.int64)
        hot = np.zeros((len(self), self.dataset.num_classes), np.float32)
        for row, labels in enumerate(self.labels):
            hot[row, labels] = 1
        return hot

    def read(self, i: int) -> bytes:
        """The bytes of picture `i`; safe to call from several threads."""
        name, offset, length = self.shards[i], self._offsets[i], self._lengths[i]
        with self._lock:
            file = self._files.pop(name) if name in self._files else self._opened(name)
            self._files[name] = file
            if len(self._files) > MAX_OPEN:
                self._let_go(next(iter(self._files)))
            if not isinstance(file, LocalFile):
                file.seek(offset)
                return file.read(length)
        return file.read(offset, length)

    def _opened(self, name: str) -> Any:
        path = self.dataset.folder.path(name)
        return LocalFile(os.open(path, os.O_RDONLY)) if os.path.exists(path) else self.dataset.folder.open(name)

    def _let_go(self, name: str) -> None:
        file = self._files.pop(name)
        if not isinstance(file, LocalFile):  # another thread may still read a local one
            file.close()

    def close(self) -> None:
        for name in list(self._files):
            self._let_go(name)

    def __del__(self) -> None:
        self.close()


class LocalFile:
    """A file on this machine's disk, closed when the last of the threads that read it lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        """Safe to call from several threads at once."""
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)
