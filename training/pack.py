"""Stage `pack`: pictures → shards, for upstream or one tenant.

    bit pack            (data/upstream)
    bit pack digits     (tenants/digits/pictures)

One bad picture never stops it: it lands in errors.csv with its reason. Same input, same bytes, however many processes work.
"""

import csv
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.progress import track

from services import preprocess
from training import lineage, receipt, tracking
from training.config import Config, ConfigError, PackConfig
from training.data import remote, shards, sources
from training.data.dataset import Dataset
from training.data.shards import Example

STAGE = "pack"
ERRORS = "errors.csv"


class PackError(ConfigError):
    """A dataset that was refused; the message says why and what to do."""


@dataclass(frozen=True)
class Read:
    """One source file as it was read; error: why it was not, empty where it was."""

    path: str
    data: bytes = b""
    suffix: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    error: str = ""


Packer = Callable[[Path, Path, PackConfig], tuple[dict[str, Any], list[tuple[str, str]]]]


def source_of(config: Config, tenant: str | None) -> Path:
    """Where the pictures of upstream, or of one tenant, lie."""
    default = Path("tenants", tenant, "pictures") if tenant else Path("data/upstream")
    return Path(config.pack.source) if config.pack.source else default


def main(config: Config, tenant: str | None = None, make: Packer | None = None, push: str | None = None) -> None:
    """Packs the pictures of upstream, or of one tenant, and writes the stage's receipt.

    make: what writes the dataset; default: `pack` (parts.py merges what several machines packed). push: URL of a DVC remote that
    gets the shards too, to be read from there by content hash.
    """
    source, out = source_of(config, tenant), receipt.folder(STAGE, tenant)
    digest = lineage.dvc_md5(source)
    params = {STAGE: config.pack.model_dump()}
    with tracking.start(config.tracking_uri, STAGE, tenant, params, {"dvc.md5": digest}) as run:
        index, failures = (make or pack)(source, out, config.pack)
        metrics = {f"{split}_examples": float(told["num_examples"]) for split, told in index["splits"].items()}
        metrics |= {"classes": float(len(index["classes"])), "errors": float(len(failures))}
        run.metrics(metrics)
        run.artifact(out / shards.INDEX)
        run.artifact(out / ERRORS)
        total = sum(shard["size_bytes"] for told in index["splits"].values() for shard in told["shards"])
        uri = remote.push(out, push) if push else out.as_posix()
        dataset = receipt.Artifact(uri=uri, sha256=Dataset.open(out).fingerprint, size_bytes=total)
        receipt.Receipt(
            stage=STAGE,
            tenant=tenant,
            config_hash=receipt.hash_of(config.pack),
            inputs={"dvc.md5": digest},
            run_id=run.run_id,
            outputs={"dataset": dataset},
            metrics=metrics,
        ).write(out)
    if push:
        print(f"{total} bytes of shards are at {uri}", file=sys.stderr)


def pack(
    source: Path, out: Path, stage: PackConfig, processes: int | None = None, part: tuple[int, int] = (0, 1)
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Reads every picture of `source` and writes a dataset to `out`; returns its index and the (file, reason) failures.

    Without splits in the source, a picture's split follows from a hash of its content, so duplicates stay together.
    part: (number, count) packs one of `count` runs of the source's pictures, their keys and classes those of the whole.
    Raises PackError when nothing can be read, when labels and `multi_label` disagree, or, if `strict`, on any failure.
    """
    try:
        records = sources.read(source)
    except sources.SourceError as error:
        raise PackError(str(error)) from None
    multi_label = any(len(record.labels) > 1 for record in records) if stage.multi_label is None else stage.multi_label
    if not multi_label and (several := next((r for r in records if len(r.labels) > 1), None)):
        raise PackError(
            f"{several.path} has the labels {', '.join(several.labels)}; set pack.multi_label: true to allow several."
        )
    classes = sorted({label for record in records for label in record.labels})
    number = {label: index for index, label in enumerate(classes)}
    begin, end = (len(records) * edge // part[1] for edge in (part[0], part[0] + 1))
    records = records[begin:end]
    failures: list[tuple[str, str]] = []

    def examples() -> Iterator[tuple[str, Example]]:
        pictures = read_all([record.path for record in records], processes)
        shown = track(pictures, f"packing {source}", len(records), console=Console(stderr=True), transient=True)
        for count, (record, read) in enumerate(zip(records, shown, strict=True), begin):
            if read.error:
                failures.append((read.path, read.error))
                continue
            labels = tuple(number[label] for label in record.labels)
            split = record.split or split_of(read.sha256, stage.splits)
            key = f"{count:08d}"
            yield split, Example(key, read.data, read.suffix, labels, read.width, read.height, read.sha256)

    settings = stage.model_dump(include={"splits", "shard_bytes"})
    out.mkdir(parents=True, exist_ok=True)
    try:
        index = shards.write(out, examples(), classes, multi_label, stage.shard_bytes, settings)
    except shards.DatasetError as error:
        raise PackError(str(error)) from None
    finally:
        with (out / ERRORS).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *failures])
    if failures:
        print(f"{len(failures)} of {len(records)} pictures were left out; reasons in {out / ERRORS}", file=sys.stderr)
        if stage.strict:
            first = ": ".join(failures[0])
            raise PackError(f"pack.strict: {first} ({len(failures)} in all, see {out / ERRORS})")
    return index, failures


def split_of(sha256: str, splits: dict[str, float]) -> str:
    """The split of a picture by its content: the hash as a number in [0, 1) falls into one split's share."""
    place, total, share = int(sha256[:12], 16) / 16**12, sum(splits.values()), 0.0
    for split, weight in splits.items():
        share += weight / total
        if place < share:
            return split
    return list(splits)[-1]


def read_all(paths: list[Path], processes: int | None = None) -> Iterator[Read]:
    """Every file, in order; over several processes where there are enough files for that to pay."""
    processes = processes or os.cpu_count() or 1
    if processes == 1 or len(paths) < 500:
        yield from map(read_one, paths)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("forkserver")) as pool:
        yield from pool.map(read_one, paths, chunksize=256)


def read_one(path: Path) -> Read:
    """A picture file, as `read_bytes` keeps it. Never raises for a bad picture."""
    try:
        return read_bytes(path.read_bytes(), str(path))
    except OSError as error:
        return Read(str(path), error=str(error))


def read_bytes(data: bytes, path: str) -> Read:
    """JPEG and PNG pictures are kept byte for byte; every other kind becomes PNG. Never raises for a bad picture."""
    try:
        image = preprocess.decode(data)
    except preprocess.PictureError as error:
        return Read(path, error=str(error))
    kind = preprocess.sniff(data)
    if kind not in ("jpeg", "png"):
        data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    height, width = image.shape[:2]
    suffix = "jpg" if kind == "jpeg" else "png"
    return Read(path, data, suffix, width, height, hashlib.sha256(data).hexdigest())
