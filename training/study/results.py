"""results.csv and results.parquet: one row per run, with all that decided it. What a row's key names is never run again.

The key is every column but what was measured: the run, and the hashes of the upstream weights, the configuration and the drawn
examples. A row whose hashes are no longer current stays in the file and is left out of tables and plots.
"""

import csv
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training.config import ConfigError
from training.study.suites import Unit

KEY = (
    *("protocol", "dataset", "group", "method", "arch", "upstream", "share", "noise", "shots", "seed"),
    *("upstream_sha256", "config_hash", "data_hash"),
)
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("protocol", "dataset", "group", "method", "arch", "upstream")),
        *((name, pa.float64()) for name in ("share", "noise")),
        *((name, pa.int64()) for name in ("shots", "seed")),
        *((name, pa.string()) for name in ("upstream_sha256", "config_hash", "data_hash")),
        ("accuracy", pa.float64()),
        ("validation_accuracy", pa.float64()),
        ("seconds", pa.float64()),
        ("run_id", pa.string()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One line of the results. accuracy: on the test examples; validation_accuracy: where the protocol has them."""

    protocol: str
    dataset: str
    group: str
    method: str
    arch: str
    upstream: str
    share: float
    noise: float
    shots: int
    seed: int
    upstream_sha256: str
    config_hash: str
    data_hash: str
    accuracy: float
    validation_accuracy: float | None
    seconds: float
    run_id: str

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)


def key_of(unit: Unit, group: str, upstream_sha256: str, config_hash: str, data_hash: str) -> tuple[Any, ...]:
    """The key of a run, in the order of KEY."""
    up = unit.upstream
    told = (unit.protocol, unit.dataset, group, unit.method, up.arch, up.label, up.share, up.noise)
    return (*told, unit.shots, unit.seed, upstream_sha256, config_hash, data_hash)


class Results:
    """The rows of a folder. Every row is on disk before the next run begins; both files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.csv, self.parquet = folder / "results.csv", folder / "results.parquet"
        self.rows: dict[tuple[Any, ...], Row] = {}
        if self.parquet.is_file():
            for told in pq.read_table(self.parquet, schema=SCHEMA).to_pylist():
                row = Row(**told)
                self.rows[row.key] = row

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        told = [asdict(row) for row in self.rows.values()]
        temporary = self.csv.with_name(f".{self.csv.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, SCHEMA.names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(told)
        temporary.rename(self.csv)
        temporary = self.parquet.with_name(f".{self.parquet.name}.tmp")
        pq.write_table(pa.Table.from_pylist(told, SCHEMA), temporary)
        temporary.rename(self.parquet)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """One process at a time writes a folder's results. Raises ConfigError for the second."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is being written by another `bit benchmark`; wait until it has ended."
            ) from None
        file.write(str(os.getpid()))
        file.flush()
        yield
