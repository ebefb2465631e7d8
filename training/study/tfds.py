"""TFDS's folders: tfrecord files of serialised examples, read without TensorFlow.

A record is its length (8 bytes), a checksum, the bytes, a checksum; an example is a protocol buffer, a map from field names to
lists of bytes, floats or integers (tensorflow/core/example/{example,feature}.proto).
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from training.data.sources import SourceError
from training.study.folders import SPLITS
from training.study.source import Sample, Source, Task


def read(folder: Path, task: Task) -> Source | None:
    """The newest version below a folder: <name>/[<config>/]<version>/{dataset_info.json, <name>-<split>.tfrecord-…}."""
    versions = sorted(path.parent for path in folder.rglob("dataset_info.json")) if folder.is_dir() else []
    if not versions:
        return None
    version = versions[-1]
    files = {path: split for path in sorted(version.glob("*.tfrecord-*")) if (split := _split(path))}
    if not files:
        raise SourceError(f"{version} has a dataset_info.json and no tfrecord files of train, validation or test.")

    def samples() -> Iterator[Sample]:
        for path, split in files.items():
            for record in records(path):
                fields = parse(record)
                if "image" not in fields:
                    raise SourceError(f"{path}: an example without `image`; its fields are {', '.join(fields)}.")
                yield split, task.of(fields), fields["image"][0]

    return Source(version, _classes(version, task), samples())


def _split(path: Path) -> str | None:
    found = re.search(r"-([a-z]+)\.tfrecord-", path.name)
    return SPLITS.get(found[1]) if found else None


def _classes(version: Path, task: Task) -> list[str]:
    names = version / f"{task.label}.labels.txt"
    return names.read_text().rstrip("\n").split("\n") if names.is_file() else task.numbers


def records(path: Path) -> Iterator[bytes]:
    """The records of a file. Raises SourceError for one that is cut short."""
    with path.open("rb") as file:
        while head := file.read(12):
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else -1
            data = file.read(length + 4) if length >= 0 else b""
            if length < 0 or len(data) < length + 4:
                raise SourceError(f"{path} is cut short; prepare or copy it again.")
            yield data[:length]


def parse(example: bytes) -> dict[str, list[Any]]:
    """The fields of a serialised example: a list of values each."""
    told: dict[str, list[Any]] = {}
    for _, features in _fields(example):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))
            told[parts[1].decode()] = _values(parts.get(2, b""))
    return told


def _values(feature: bytes) -> list[Any]:
    for kind, data in _fields(feature):
        if kind == 1:
            values: list[Any] = [value for _, value in _fields(data)]
        elif kind == 2:
            values = [x for _, value in _fields(data) for x in np.frombuffer(value, "<f4").tolist()]
        else:
            values = [x for _, value in _fields(data) for x in ([value] if isinstance(value, int) else _varints(value))]
            values = [x - 2**64 if x >= 2**63 else x for x in values]
        return values
    return []


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: integers, or the bytes of anything else."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 == 0:
            value, place = _varint(message, place)
            yield tag >> 3, value
            continue
        size, place = _varint(message, place) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], place)
        yield tag >> 3, message[place : place + size]
        place += size


def _varints(data: bytes) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
