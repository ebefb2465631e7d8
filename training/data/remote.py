"""Folders of files by URL: a local path, any fsspec URL, or a `.dir` object of a DVC remote, which is read by content hash.

A DVC remote keeps every file as `<remote>/files/md5/ab/cdef…` and a folder as `…/ab/cdef….dir`, a JSON list of its files. What is
named by its content never changes: files from elsewhere are kept on local disk (BIT_CACHE_DIR) as they are first read, and
held against their name before.
"""

import hashlib
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import fsspec

from training.errors import UserError

DIR = ".dir"
FILES = "files/md5"


class RemoteError(UserError):
    """A file of a DVC remote that isn't what its name, the hash of its content, says."""


class Folder:
    """The files of a folder, wherever it is. url: local path, fsspec URL, or URL of a `.dir` object."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _listing(self) -> dict[str, str]:
        """Name → URL of each file of a `.dir` object."""
        base = posixpath.dirname(posixpath.dirname(self.url))
        with fsspec.open(self.url, "rb") as file:
            data = file.read()
        _hold(self.url, hashlib.md5(data, usedforsecurity=False).hexdigest())
        return {row["relpath"]: f"{base}/{_hashed(row['md5'])}" for row in json.loads(data)}

    def path(self, name: str) -> str:
        """Path or URL of a file. Raises FileNotFoundError for one that a `.dir` object does not list."""
        if not self.url.endswith(DIR):
            return posixpath.join(self.url, name)
        if name not in self._listing:
            raise FileNotFoundError(f"{self.url} lists no {name}")
        return self._listing[name]

    def open(self, name: str) -> Any:
        """A file, open for reading at random. Raises RemoteError for one that isn't what its hash says."""
        path = self.path(name)
        return fsspec.open(path if not self.url.endswith(DIR) or is_local(path) else _kept(path), "rb").open()

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def file(self, name: str) -> "File":
        """A file, to be read at random by several threads. Raises RemoteError for one that isn't what its hash says."""
        path = self.path(name)
        if self.url.endswith(DIR) and not is_local(path):
            path = str(_kept(path))
        return LocalFile(path.removeprefix("file://")) if is_local(path) else RemoteFile(path)


class File(Protocol):
    """Read at random, by several threads at once."""

    def read(self, offset: int, length: int) -> bytes: ...


class LocalFile:
    """A file on this machine's disk, closed when the last of the threads that read it lets go of it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):  # it could be opened
            os.close(self._descriptor)


class RemoteFile:
    """A file of a store: one request for each part that is read, of that part alone."""

    def __init__(self, url: str) -> None:
        self._fs, self._path = fsspec.core.url_to_fs(url)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._fs.cat_file(self._path, start=offset, end=offset + length))


def _kept(url: str) -> Path:
    """The file of a content hash, on this machine's disk; fetched and checked at first, never there in part."""
    folder = Path(os.environ.get("BIT_CACHE_DIR", Path(tempfile.gettempdir(), "bit-cache")))
    path = folder.joinpath(*url.split("/")[-2:])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with fsspec.open(url, "rb") as source, tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary, digest = Path(file.name), hashlib.md5(usedforsecurity=False)
            try:
                while block := source.read(2**20):
                    digest.update(block)
                    file.write(block)
                file.flush()
                _hold(url, digest.hexdigest())
                temporary.rename(path)  # another rank may have been faster: its file is the same
            except BaseException:  # Ctrl-C too leaves no part behind
                temporary.unlink()
                raise
    return path


def _hold(url: str, digest: str) -> None:
    expected = "".join(url.removesuffix(DIR).split("/")[-2:])
    if digest != expected:
        raise RemoteError(
            f"{url} hashes to {digest}, its name says {expected}: it was damaged on its way or in the store. "
            "Try again; if that does not help, remove it from the remote and run `dvc push` (or `bit submit`) again."
        )


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def push(folder: Path, remote: str, send: bool = True) -> str:
    """Uploads a folder as `dvc push` would; what is there already is not sent again. Returns the URL of its `.dir` object.

    send: false only tells where it would be.
    """
    listed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        url = f"{remote}/{FILES}/{_hashed(digest)}"
        if send and not exists(url):
            upload(path, url)
        listed.append({"md5": digest, "relpath": path.relative_to(folder).as_posix()})
    data = json.dumps(sorted(listed, key=lambda row: row["relpath"]), sort_keys=True).encode()
    url = f"{remote}/{FILES}/{_hashed(hashlib.md5(data, usedforsecurity=False).hexdigest())}{DIR}"
    if send:
        write(data, url)
    return url


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Every store has errors of its own for keys that lack and hosts that do not answer: here they are OSErrors, as a disk's."""
    try:
        yield
    except (OSError, ValueError, ImportError, UserError):
        raise
    except Exception as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def exists(url: str) -> bool:
    with asking(url):
        fs, path = fsspec.core.url_to_fs(url)
        return bool(fs.exists(path))


def text(url: str) -> str | None:
    """A small file, None where it isn't there (or its store doesn't answer)."""
    try:
        with asking(url), fsspec.open(url, "rt") as file:
            return str(file.read())
    except OSError:
        return None


def remove(url: str) -> None:
    """Removes a file. What is not there is removed already."""
    with asking(url):
        fs, path = fsspec.core.url_to_fs(url)
        if fs.exists(path):
            fs.rm_file(path)


def upload(path: Path, url: str) -> None:
    """A local file to a URL, in place of what was there; it appears whole or not at all."""
    with asking(url), path.open("rb") as source:
        fs, target = fsspec.core.url_to_fs(url)
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        with fs.transaction, fs.open(target, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)


def write(data: bytes, url: str) -> None:
    """Bytes to a URL, in place of what was there; they appear whole or not at all."""
    with asking(url):
        fs, target = fsspec.core.url_to_fs(url)
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        with fs.transaction, fs.open(target, "wb") as file:
            file.write(data)


def _hashed(md5: str) -> str:
    return f"{md5[:2]}/{md5[2:]}"
