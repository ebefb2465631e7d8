"""Folders of files by URL: a local path, any fsspec URL, or a `.dir` object of a DVC remote, which is read by content hash.

A DVC remote keeps every file as `<remote>/files/md5/ab/cdef…` and a folder as `…/ab/cdef….dir`, a JSON list of its files. What is
named by its content never changes: files from elsewhere are kept on local disk (BIT_CACHE_DIR) as they are first read.
"""

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

DIR = ".dir"
FILES = "files/md5"


class Folder:
    """The files of a folder, wherever it is. url: local path, fsspec URL, or URL of a `.dir` object."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _listing(self) -> dict[str, str]:
        """Name → URL of each file of a `.dir` object."""
        base = posixpath.dirname(posixpath.dirname(self.url))
        with fsspec.open(self.url, "rb") as file:
            listed = json.loads(file.read())
        return {row["relpath"]: f"{base}/{_hashed(row['md5'])}" for row in listed}

    def path(self, name: str) -> str:
        """Path or URL of a file. Raises FileNotFoundError for one that a `.dir` object does not list."""
        if not self.url.endswith(DIR):
            return posixpath.join(self.url, name)
        if name not in self._listing:
            raise FileNotFoundError(f"{self.url} lists no {name}")
        return self._listing[name]

    def open(self, name: str) -> Any:
        """A file, open for reading at random."""
        path = self.path(name)
        if not self.url.endswith(DIR) or is_local(path):
            return fsspec.open(path, "rb").open()
        kept = os.environ.get("BIT_CACHE_DIR", posixpath.join(tempfile.gettempdir(), "bit-cache"))
        return fsspec.open(f"filecache::{path}", "rb", filecache={"cache_storage": kept}).open()

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def push(folder: Path, remote: str) -> str:
    """Uploads a folder as `dvc push` would; what is there already is not sent again. Returns the URL of its `.dir` object."""
    listed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        url = f"{remote}/{FILES}/{_hashed(digest)}"
        fs, target = fsspec.core.url_to_fs(url)
        if not fs.exists(target):
            upload(path, url)
        listed.append({"md5": digest, "relpath": path.relative_to(folder).as_posix()})
    data = json.dumps(sorted(listed, key=lambda row: row["relpath"]), sort_keys=True).encode()
    url = f"{remote}/{FILES}/{_hashed(hashlib.md5(data, usedforsecurity=False).hexdigest())}{DIR}"
    write(data, url)
    return url


def upload(path: Path, url: str) -> None:
    """A local file to a URL, in place of what was there; it appears whole or not at all."""
    fs, target = fsspec.core.url_to_fs(url)
    fs.makedirs(posixpath.dirname(target), exist_ok=True)
    with path.open("rb") as source, fs.transaction, fs.open(target, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def write(data: bytes, url: str) -> None:
    """Bytes to a URL, in place of what was there; they appear whole or not at all."""
    fs, target = fsspec.core.url_to_fs(url)
    fs.makedirs(posixpath.dirname(target), exist_ok=True)
    with fs.transaction, fs.open(target, "wb") as file:
        file.write(data)


def _hashed(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"
