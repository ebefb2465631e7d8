"""Packing by several machines at once: each packs one part of the pictures, then one merges the parts without reading a picture.

    bit pack --part 3/16        (one of sixteen; k8s/pack.yaml runs all of them as an Indexed Job)
    bit pack --merge 16         (afterwards, on the same folder)

Pictures, keys, order and labels are those of a single `bit pack`; only where shards begin differs.
"""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training import pack, receipt
from training.config import Config, ConfigError
from training.data import shards


def parse(text: str) -> tuple[int, int]:
    """3/16 → (3, 16): parts count from 0. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if number >= count:
        raise ConfigError(f"--part {text!r}: write NUMBER/COUNT with NUMBER from 0 to COUNT - 1, as in 0/16.")
    return number, count


def folder_of(out: Path) -> Path:
    """Where the parts of a dataset lie until they are joined: beside it."""
    return out.with_name(f"{out.name}.parts")


def write(config: Config, tenant: str | None, part: tuple[int, int]) -> None:
    """Packs one part into its own folder beside the stage's."""
    folder = folder_of(receipt.folder(pack.STAGE, tenant)) / f"{part[0]:05d}"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was interrupted
    temporary = folder.with_suffix(".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pack.pack(pack.source_of(config, tenant), temporary, config.pack, part=part)
    temporary.rename(folder)


def merge(config: Config, tenant: str | None, count: int, push: str | None = None) -> None:
    """The stage `pack` with its parts in place of the pictures: shards renamed, tables joined, one index, the receipt.

    The parts go when the receipt is written, so that it can be tried again. push: as for `pack.main`.
    """
    pack.main(config, tenant, lambda source, out, stage: join(out, count), push)
    shutil.rmtree(folder_of(receipt.folder(pack.STAGE, tenant)))


def join(out: Path, count: int) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Makes one dataset of the parts beside `out`; returns its index and the failures of all parts. Raises ConfigError.

    Interrupted, it can be run again: shards go to their final names one by one, and the index is written when all are there.
    """
    parts = folder_of(out)
    folders = [parts / f"{number:05d}" for number in range(count)]
    if missing := [folder.name for folder in folders if not (folder / shards.INDEX).is_file()]:
        raise ConfigError(f"{parts} lacks the parts {', '.join(missing)} of {count}: run `bit pack --part …/{count}`.")
    indexes = [json.loads((folder / shards.INDEX).read_text()) for folder in folders]
    first = indexes[0]
    if any(index["classes"] != first["classes"] or index["pack"] != first["pack"] for index in indexes):
        raise ConfigError(f"the parts below {parts} are of different pictures or settings: pack all of them again.")
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, Any] = {}
    tables: dict[str, list[pa.Table]] = {}
    for folder, index in zip(folders, indexes, strict=True):
        table = pq.read_table(folder / shards.EXAMPLES)
        for split, told in index["splits"].items():
            merged = splits.setdefault(
                split, {"num_examples": 0, "class_counts": [0] * len(first["classes"]), "shards": []}
            )
            names = {}
            for shard in told["shards"]:
                name = f"{split}-{len(merged['shards']):05d}.tar"
                names[shard["name"]] = name
                merged["shards"].append(shard | {"name": name})
                if (folder / shard["name"]).exists():  # else an interrupted merge moved it
                    (folder / shard["name"]).rename(out / name)
            merged["num_examples"] += told["num_examples"]
            merged["class_counts"] = [a + b for a, b in zip(merged["class_counts"], told["class_counts"], strict=True)]
            own = table.filter(pa.compute.equal(table["split"], split))
            renamed = pa.array([names[name] for name in own["shard"].to_pylist()], pa.string())
            tables.setdefault(split, []).append(own.set_column(own.schema.get_field_index("shard"), "shard", renamed))
    ordered = {split: splits[split] for split in sorted(splits)}
    examples = pa.concat_tables([table for split in ordered for table in tables[split]])
    multi_label = any(index["multi_label"] for index in indexes)
    failures = [row for folder in folders for row in _failures(folder / pack.ERRORS)]
    with (out / pack.ERRORS).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("file", "reason"), *failures])
    return shards.finish(out, examples, ordered, first["classes"], multi_label, first["pack"]), failures


def _failures(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file))[1:]]
