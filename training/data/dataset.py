"""Packed datasets, read at random: from a folder, an object store or a DVC remote. The format: training/data/shards.py."""

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from training.data.remote import Folder
from training.data.shards import EXAMPLES, FORMAT, INDEX, DatasetError

MAX_OPEN = 64  # shards of a split: most systems allow a process 1,024 files, some 256


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
