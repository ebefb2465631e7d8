"""Answers to many pictures without HTTP, by the engine and the preprocessing that serve: `bit predict`.

    bit predict digits pictures/ --out answers.parquet              (the champion of MLflow's registry)
    bit predict digits s3://bucket/pictures --out s3://bucket/answers.parquet --alias challenger
    bit predict digits pictures.csv --out answers.parquet --models exports/

One thread per core, each reading, decoding and asking for a batch, as the service's workers do. Finished parts lie beside the
result until it is whole: a run that was killed goes on where it was and ends with the same bytes. On a cluster each pod of
an Indexed Job answers one slice (k8s/predict.yaml).
"""

import hashlib
import io
import json
import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from services import preprocess
from training import replay, tracking
from training.config import Config, ConfigError
from training.data import pictures as sources
from training.data.pictures import Pictures
from training.errors import is_outage, outages, reason

BATCH = 8
PART = 256  # batches: so much is done again, at most, after a kill
SCHEMA = pa.schema(
    [
        ("picture", pa.string()),
        ("class", pa.string()),
        ("probability", pa.float32()),
        ("unknown", pa.bool_()),
        ("classes", pa.list_(pa.string())),
        ("probabilities", pa.list_(pa.float32())),
        ("error", pa.string()),
    ]
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Export:
    """An export and the version that it is; for a file, the start of its hash."""

    data: bytes
    version: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def main(
    tenant: str, export: Export, source: str, out: str, top: int, workers: int, index: int = 0, slices: int = 1
) -> tuple[int, int]:
    """Answers all pictures of a slice and writes the Parquet file; returns (pictures, errors). Raises UserError."""
    found = sources.find(source).cut(index, slices)
    if slices > 1:
        stem, suffix = os.path.splitext(out)
        out = f"{stem}-{index:05d}-of-{slices:05d}{suffix}"
    session = replay.load(export.data, f"version {export.version} of {tenant}")
    plan = plan_of(export, source, found, top)
    with outages(out):
        parts = Parts(out, plan)
    about = {
        "tenant": tenant,
        "version": export.version,
        "sha256": export.sha256,
        "top": top,
        "pictures": hashlib.sha256("\n".join(found.names).encode()).hexdigest(),
        "all_classes": session.card.classes,
    }
    batches = [list(range(i, min(i + BATCH, len(found)))) for i in range(0, len(found), BATCH)]
    done = parts.count
    began, fresh = time.monotonic(), 0
    with outages(out), Progress(disable=not sys.stderr.isatty()) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(tenant, total=len(found), completed=min(len(found), done * PART * BATCH))
        answered = _in_order(pool, session, found, batches[done * PART :], top, workers)
        while rows := [row for batch in islice(answered, PART) for row in batch]:
            parts.add(rows)
            fresh += len(rows)
            bar.advance(task, len(rows))
            if bar.disable:
                rate = fresh / (time.monotonic() - began)
                print(
                    f"{min(len(found), parts.count * PART * BATCH):,} of {len(found):,} · {rate:,.0f} pictures/s",
                    flush=True,
                )
    with outages(out):
        return parts.join(about)


def plan_of(export: Export, source: str, found: Pictures, top: int) -> dict[str, Any]:
    """What must be the same for a run to go on where another ended."""
    pictures = {"source": sources.whole_name(source), "pictures": found.fingerprint()}
    return {"sha256": export.sha256, "top": top, **pictures}


def find_export(config: Config, tenant: str, version: int | None, alias: str, out: str = "", run: str = "") -> Export:
    """From the registry, checked against its hash. Raises ConfigError with the choices.

    run: name of a run of several processes that write beside `out`: all get the version that the first of them found.
    """
    with tracking.asked(config.tracking_uri):
        client = tracking.connect(config.tracking_uri)
        known = {int(found.version): found for found in tracking.versions(client, tenant)}
        found = known.get(version) if version is not None else tracking.version_at(client, tenant, alias)
    if found is not None and version is None and run:
        with outages(out):
            found = known.get(int(pin(out, run, str(found.version))))
    if found is None:
        asked = f"no version {version}" if version is not None else f"no version with the alias {alias!r}"
        raise ConfigError(
            f"{tenant!r} has {asked}. Versions: {', '.join(map(str, sorted(known))) or 'none yet'}. "
            f"Promote one (`bit promote {tenant}`), or give --version or --models."
        )
    with tracking.asked(config.tracking_uri):
        return Export(tracking.export_of(client, found), str(found.version))


def read_export(place: Path, tenant: str) -> Export:
    """A file, or `<tenant>.onnx` in a folder. Raises ConfigError."""
    path = place / f"{tenant}.onnx" if place.is_dir() else place
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--models {place}: {path} cannot be read ({error.strerror}).") from None
    return Export(data, hashlib.sha256(data).hexdigest()[:12])


class Parts:
    """Finished pieces of a result, in a folder beside it that goes when the result is there. Paths or fsspec URLs."""

    def __init__(self, out: str, plan: dict[str, Any]) -> None:
        """Raises ConfigError where the folder holds pieces of other work, or nothing can be written.

        Pieces without a plan are a removal's rest and go.
        """
        self.out, self.count = out, 0
        try:
            self.fs, self.path = fsspec.core.url_to_fs(out)
            self.folder = f"{self.path}.parts"
            self._begin(plan)
        except OSError as error:
            if is_outage(error):
                raise
            raise ConfigError(
                f"--out {out} cannot be written: {reason(error)}. Name a file, in a folder or bucket that you may write to."
            ) from error

    def _begin(self, plan: dict[str, Any]) -> None:
        if self.fs.isdir(self.path):
            raise ConfigError(
                f"--out {self.out} is a folder. Name a file in it, as in {self.out.rstrip('/')}/answers.parquet."
            )
        noted = f"{self.folder}/plan.json"
        if self.fs.exists(noted):
            if json.loads(self.fs.cat_file(noted)) != plan:
                raise ConfigError(
                    f"{self.out}.parts is from an unfinished run over other pictures, or pictures that were changed since, or by "
                    "another version. Delete that folder, or choose another --out."
                )
        else:
            if self.fs.exists(self.folder):
                self.fs.rm(self.folder, recursive=True)
            _write(self.fs, noted, json.dumps(plan).encode())
        while self.fs.exists(self._name(self.count)):
            self.count += 1

    def add(self, rows: list[Row]) -> None:
        _write(self.fs, self._name(self.count), _parquet(pa.Table.from_pylist(rows, SCHEMA)))
        self.count += 1

    def join(self, about: dict[str, Any]) -> tuple[int, int]:
        """All parts as one file, whose metadata say who answered; returns (rows, errors)."""
        found = [
            pq.read_table(io.BytesIO(self.fs.cat_file(self._name(n))), use_threads=False) for n in range(self.count)
        ]
        table = pa.concat_tables(found or [SCHEMA.empty_table()])
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in about.items()})
        _write(self.fs, self.path, _parquet(table))
        self.fs.rm(self.folder, recursive=True)
        return len(table), len(table) - table["error"].null_count

    def _name(self, number: int) -> str:
        return f"{self.folder}/{number:06d}.parquet"


def pin(out: str, run: str, version: str) -> str:
    """The version that all slices of a run use: the one that the first of them told, which is kept beside the result."""
    fs, path = fsspec.core.url_to_fs(f"{out}.{run}.version")
    if not fs.exists(path):
        with suppress(FileExistsError):  # another slice was first
            _write(fs, path, version.encode(), once=True)
    return fs.cat_file(path).decode()


def _write(fs: fsspec.AbstractFileSystem, path: str, data: bytes, once: bool = False) -> None:
    """A file appears whole or not at all; object stores do that by themselves. once: raises FileExistsError where it is there."""
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    if "file" not in fs.protocol:
        fs.pipe_file(path, data, mode="create" if once else "overwrite")
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    fs.pipe_file(temporary, data)
    if once:
        try:
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
    else:
        os.replace(temporary, path)


def _in_order(
    pool: ThreadPoolExecutor, session: Any, found: Pictures, batches: list[list[int]], top: int, workers: int
) -> Iterator[list[Row]]:
    """The batches' rows, in order, while the workers are a few batches ahead."""
    waiting: deque[Future[list[Row]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_answer, session, found, batch, top))
        if len(waiting) >= 4 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _answer(session: Any, found: Pictures, batch: list[int], top: int) -> list[Row]:
    card, rows, pixels = session.card, [], []
    for i in batch:
        row: Row = {"picture": found.names[i], "error": None}
        try:
            pixels.append(preprocess.pixels(found.read(i), card.resolution))
        except Exception as error:  # each store has errors of its own; one picture must not end a run over millions
            row["error"] = reason(error)
        rows.append(row)
    if not pixels:
        return rows
    answers = iter(session.run(np.stack(pixels))[0])
    for row in rows:
        if row["error"] is None:
            probabilities = next(answers)
            best = np.argsort(-probabilities, kind="stable")[:top]
            highest = float(probabilities[best[0]])
            row |= {
                "class": card.classes[best[0]],
                "probability": highest,
                "unknown": card.threshold is not None and highest < card.threshold,
                "classes": [card.classes[k] for k in best],
                "probabilities": probabilities[best],
            }
    return rows


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
