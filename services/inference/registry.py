"""Where versions come from: the seam, and a folder of exports. MLflow's registry: services/inference/mlflow_registry.py."""

import hashlib
import logging
from pathlib import Path
from typing import Protocol

from services.inference.aliases import ALIASES, CHAMPION, Wanted

log = logging.getLogger("bit.registry")


class RegistryDown(Exception):
    """The registry does not answer; what is served stays."""


class Registry(Protocol):
    """Every method but `remembered` and `forget` may raise RegistryDown; `fetch`, `size_bytes` and `report` also Refused."""

    def poll(self) -> set[Wanted]:
        """What should be served."""

    def remembered(self) -> set[Wanted]:
        """What was served before, as far as its exports are still in the cache."""

    def size_bytes(self, wanted: Wanted) -> int:
        """Size of the export, before it is fetched."""

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        """The export of a version and its sha256, which has been checked."""

    def report(self, wanted: Wanted, state: str) -> None:
        """Notes what became of a version: for a later start without the registry, and for the person who promoted it."""

    def forget(self, tenant: str, alias: str) -> None:
        """The alias is gone: a later start without the registry must not serve it again. Raises nothing."""


class FolderRegistry:
    """`<tenant>.onnx` files in a folder, each the champion of its tenant (`<tenant>@challenger.onnx`: the challenger).

    The version is the start of the file's sha256.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._device: int | None = None  # st_dev of the folder when it was looked at last

    def poll(self) -> set[Wanted]:
        wanted = set()
        try:
            device = self.folder.stat().st_dev  # a folder that isn't there is no empty one
            paths = sorted(path for path in self.folder.iterdir() if path.suffix == ".onnx")
            if not paths and self._device not in (None, device):
                raise RegistryDown(
                    f"{self.folder} is empty and on another file system than before: is it still mounted?"
                )
            self._device = device
            for path in paths:
                tenant, _, alias = path.stem.partition("@")
                served = not tenant.startswith(".") and alias in ("", *ALIASES)
                if served and (digest := self._sha256(path)) is not None:
                    wanted.add(Wanted(tenant, alias or CHAMPION, digest[:12]))
        except OSError as error:
            raise RegistryDown(f"{self.folder} cannot be read: {error}") from error
        return wanted

    def remembered(self) -> set[Wanted]:
        return set()  # the folder is all there is

    def size_bytes(self, wanted: Wanted) -> int:
        try:
            return self._path(wanted).stat().st_size
        except OSError as error:
            raise RegistryDown(f"{wanted.tenant}.onnx cannot be read: {error}") from error

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        try:
            data = self._path(wanted).read_bytes()
        except OSError as error:
            raise RegistryDown(f"{wanted.tenant}.onnx cannot be read: {error}") from error
        digest = hashlib.sha256(data).hexdigest()
        if not digest.startswith(wanted.version):
            raise RegistryDown(f"{wanted.tenant}.onnx is being replaced")  # looked at again with the next poll
        return data, digest

    def report(self, wanted: Wanted, state: str) -> None:
        """A folder has no place for notes: the log and the API say it."""

    def forget(self, tenant: str, alias: str) -> None:
        """Nothing was remembered."""

    def _path(self, wanted: Wanted) -> Path:
        suffix = "" if wanted.alias == CHAMPION else f"@{wanted.alias}"
        return self.folder / f"{wanted.tenant}{suffix}.onnx"

    def _sha256(self, path: Path) -> str | None:
        """Read again only when inode, size or time of change differ. One that cannot be read is what it was, None at first."""
        known = self._hashes.get(path)
        try:
            stat = path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if known is None or known[0] != seen:
                with path.open("rb") as file:
                    known = self._hashes[path] = (seen, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:  # one tenant's file must not keep the others from their turn
            log.warning("%s cannot be read: %s", path, error)
        return known[1] if known else None
