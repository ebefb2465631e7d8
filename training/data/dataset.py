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

from training.data.remote import File, Folder
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
        mask = pa.compute.equal(table["split"], name)
        first, count = pa.compute.index(mask, True).as_py(), pa.compute.sum(mask).as_py()
        together = pa.compute.all(mask.slice(max(first, 0), count)).as_py()
        return Split(self, name, table.slice(first, count) if first >= 0 and together else table.filter(mask))


class Split:
    """One split's examples, in the order in which they lie in the shards. Columns are arrays: upstream splits have 14 M rows.

    shards: int32 [n], which of shard_names each example lies in.
    """

    def __init__(self, dataset: Dataset, name: str, table: pa.Table) -> None:
        self.dataset, self.name, self._table = dataset, name, table
        names, codes = np.unique(table["shard"].unique().to_pylist(), return_inverse=True)
        coded = table["shard"].combine_chunks().dictionary_encode()
        self.shard_names: list[str] = names.tolist()
        self.shards: NDArray[np.int32] = codes.astype(np.int32)[coded.indices.to_numpy()]
        self._offsets, self._lengths = table["offset"].to_numpy(), table["length"].to_numpy()
        self._labels = pa.compute.list_flatten(table["labels"]).to_numpy()
        self._starts = np.cumsum([0, *pa.compute.list_value_length(table["labels"]).to_numpy()])
        self._files: dict[str, File] = {}  # that which was used last comes last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[bytes]:
        return (self.read(i) for i in range(len(self)))

    @cached_property
    def keys(self) -> list[str]:
        return self._table["key"].to_pylist()

    @cached_property
    def sha256(self) -> list[str]:
        return self._table["sha256"].to_pylist()

    @cached_property
    def labels(self) -> list[list[int]]:
        return self._table["labels"].to_pylist()

    def targets(self, rows: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Of the rows (None: of all) int64 [m] class indices, or float32 [m, C] with a 1 for each label where there are several.

        Of several labels ask for few rows at once: a row has all classes.
        """
        rows = np.arange(len(self)) if rows is None else rows
        first, counts = self._starts[rows], self._starts[rows + 1] - self._starts[rows]
        if not self.dataset.multi_label:
            return self._labels[first].astype(np.int64)
        hot = np.zeros((len(rows), self.dataset.num_classes), np.float32)
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(rows) else 0) + np.repeat(first - ends + counts, counts)
        hot[np.repeat(np.arange(len(rows)), counts), self._labels[places]] = 1
        return hot

    def read(self, i: int) -> bytes:
        """The bytes of picture `i`; safe to call from several threads."""
        name = self.shard_names[self.shards[i]]
        with self._lock:
            file = self._files.pop(name) if name in self._files else self.dataset.folder.file(name)
            self._files[name] = file
            if len(self._files) > MAX_OPEN:
                del self._files[next(iter(self._files))]
        return file.read(int(self._offsets[i]), int(self._lengths[i]))

    def close(self) -> None:
        self._files.clear()
