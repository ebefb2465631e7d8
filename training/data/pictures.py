"""Pictures to be answered, wherever they lie: a folder, a CSV, packed shards, or a URL of any of these. Labels aren't needed.

Each source is a list of names and a way to read the i-th; names are sorted, so that a later run sees the same order.
"""

import csv
import hashlib
import io
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from training.data.dataset import Dataset
from training.data.shards import INDEX
from training.data.sources import SUFFIXES, SourceError
from training.errors import outages, reason

KINDS = "Give a folder of pictures, a picture, a .csv with the column `path`, packed shards, or a URL of one of these."


@dataclass(frozen=True)
class Pictures:
    """read: index → the encoded picture's bytes, from any thread; raises OSError where it cannot be had.

    mark: index → what is known, without reading it, of the picture's content: it changes with the picture. May be empty.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    mark: Callable[[int], str] = lambda i: ""

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, index: int, slices: int) -> "Pictures":
        """Slice `index` of `slices`: consecutive pictures, sizes that differ by one at most, every picture in one slice."""
        start, end = (len(self) * i // slices for i in (index, index + 1))
        return Pictures(self.names[start:end], lambda i: self.read(start + i), lambda i: self.mark(start + i))

    def fingerprint(self) -> str:
        """Stands for the names, their order and all marks."""
        digest = hashlib.sha256()
        for i, name in enumerate(self.names):
            digest.update(f"{name}\0{self.mark(i)}\n".encode())
        return digest.hexdigest()


def find(source: str) -> Pictures:
    """All pictures of a source. Raises SourceError where there are none, OutageError where its store is away."""
    with outages(source):
        found = _find(source)
    if not len(found):
        raise SourceError(f"{source} holds no pictures; read are {', '.join(sorted(SUFFIXES))}. {KINDS}")
    return found


def _find(source: str) -> Pictures:
    try:
        fs, root = fsspec.core.url_to_fs(source)
        if fs.isdir(root):
            return _shards(source) if fs.exists(posixpath.join(root, INDEX)) else _folder(fs, root)
        if source.lower().endswith(".csv"):
            return _table(source, fs.cat_file(root))
        about = fs.info(root)  # `exists` would say no where a server is away
        mark = _touched(root) if "file" in fs.protocol else _listed(about)
        return Pictures([posixpath.basename(root)], lambda i: fs.cat_file(root), lambda i: mark)
    except SourceError:
        raise
    except Exception as error:  # each store has errors of its own
        raise SourceError(f"{source} cannot be read: {reason(error)}. {KINDS}") from error


def whole_name(source: str) -> str:
    """The source as it was given; on this machine's disk its path without links, from wherever it was named."""
    fs, root = fsspec.core.url_to_fs(source)
    return os.path.realpath(root) if "file" in fs.protocol else source.rstrip("/")


def _folder(fs: fsspec.AbstractFileSystem, root: str) -> Pictures:
    local = "file" in fs.protocol
    listed = {path: "" if local else _listed(about) for path, about in fs.find(root, detail=True).items()}
    paths = sorted(path for path in listed if posixpath.splitext(path)[1].lower() in SUFFIXES)
    names = [path.removeprefix(root.rstrip("/") + "/") for path in paths]
    if local:  # fsspec's own way to a local file takes three times as long
        return Pictures(names, lambda i: Path(paths[i]).read_bytes(), lambda i: _touched(paths[i]))
    return Pictures(names, lambda i: fs.cat_file(paths[i]), lambda i: listed[paths[i]])


def _table(source: str, data: bytes) -> Pictures:
    """Paths are beneath the table's folder, or URLs of their own."""
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    if rows and "path" not in rows[0]:
        raise SourceError(f"{source}: no column 'path'; found {', '.join(map(str, rows[0]))}.")
    folder = posixpath.dirname(source)
    names = [row["path"] or "" for row in rows]  # a row may be too short
    places = [name if "://" in name else posixpath.join(folder, name) for name in names]

    def read(i: int) -> bytes:
        with fsspec.open(places[i], "rb") as file:
            return file.read()

    return Pictures(names, read, lambda i: _touched(places[i].removeprefix("file://")))


def _shards(source: str) -> Pictures:
    data = Dataset.open(source)
    splits = [data.split(name) for name in data.splits]
    places = [(split, i) for split in splits for i in range(len(split))]
    names = [f"{split.name}/{split.keys[i]}" for split, i in places]
    return Pictures(names, lambda number: places[number][0].read(places[number][1]), lambda number: data.fingerprint)


def _touched(path: str) -> str:
    """Size and time of the last change of a file on this machine; nothing for all else."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _listed(about: Mapping[str, Any]) -> str:
    """What a store's listing says of the content: not all tell everything, and a web server's page of links nothing."""
    return " ".join(str(about[key]) for key in ("size", "ETag", "etag", "mtime") if about.get(key) is not None)
