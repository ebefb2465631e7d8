"""Where checkpoints lie: small named files below a local folder or any fsspec URL; each appears whole or not at all."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

ENV, DEFAULT = "BIT_CHECKPOINTS", ".checkpoints"


class Store:
    """Files by names like `step-00000003/state.pt` below `url`. Raises OSError where the disk or the server does."""

    def __init__(self, url: str) -> None:
        self.url, self.is_local = url, urlsplit(url).scheme in ("", "file")
        self.fs, self.root = url_to_fs(url)

    def child(self, name: str) -> "Store":
        """The store of a folder below this one."""
        return Store(f"{self.url}/{name}")

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Locally under a temporary name, synced and renamed; object stores put whole objects by themselves."""
        path = f"{self.root}/{name}"
        if not self.is_local:
            self.fs.pipe_file(path, bytes(data))
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # a full disk gets its space back
            raise
        temporary.rename(final)
        _sync(final.parent)
        _sync(final.parent.parent)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError where it isn't there."""
        data: bytes = self.fs.cat_file(f"{self.root}/{name}")
        return data

    def folders(self) -> list[str]:
        """Names of the folders directly below the store, sorted; empty where nothing was written yet."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")

    def files(self, name: str) -> list[str]:
        """All files called `name` at any depth, as paths below the store; empty where nothing was written yet."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.root) if self.fs.exists(self.root) else []
        return sorted(path.removeprefix(f"{self.root}/") for path in found if path.endswith(f"/{name}"))

    def has(self, name: str) -> bool:
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def remove(self, name: str = "") -> None:
        """A file or a folder with all below it; nothing where it isn't there."""
        path = f"{self.root}/{name}".rstrip("/")
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)


def everything() -> Store:
    """The store of all trainings: BIT_CHECKPOINTS (a folder or an fsspec URL) or `.checkpoints`."""
    return Store(os.environ.get(ENV, DEFAULT).rstrip("/"))


def of(name: str) -> Store:
    """The store of the training `name`."""
    return everything().child(name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
