"""Verified exports on local disk by sha256, and which version each alias had: enough to start while the registry is down."""

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from services.inference.aliases import Wanted

log = logging.getLogger("bit.cache")
KEPT_S = 86_400  # an export that no alias has any more may be wanted back within a day
PART = ".part"  # ends the name of what is being written


class Cache:
    """All writes are atomic; a full disk costs the cache, never the service.

    budget_bytes: what exports may take together, 0: no limit. The folder may be shared: any of its files may be gone at any
    moment, since other instances make room too.
    """

    def __init__(self, folder: Path, budget_bytes: int = 0) -> None:
        self.folder, self.budget_bytes = folder, budget_bytes
        self.index = folder / "served.json"  # "<tenant>/<alias>" → [version, sha256]
        self._known: dict[str, list[str]] = {}
        if self.index.is_file():
            try:
                read = json.loads(self.index.read_text())
                self._known = {key: [str(version), str(sha256)] for key, (version, sha256) in read.items()}
            except (ValueError, TypeError, AttributeError):
                log.warning("%s is damaged; it will be written anew", self.index)

    def remembered(self) -> set[Wanted]:
        return {
            Wanted(tenant, alias, version)
            for (tenant, _, alias), (version, sha256) in ((k.rpartition("/"), v) for k, v in self._known.items())
            if (self.folder / f"{sha256}.onnx").is_file()
        }

    def sha256_of(self, wanted: Wanted) -> str | None:
        version, sha256 = self._known.get(f"{wanted.tenant}/{wanted.alias}", ("", ""))
        return sha256 if version == wanted.version else None

    def size_bytes(self, sha256: str) -> int:
        try:
            return (self.folder / f"{sha256}.onnx").stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def read(self, sha256: str) -> bytes | None:
        """None where it isn't there, or no longer what it was. A file's mtime is its last use."""
        path = self.folder / f"{sha256}.onnx"
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if hashlib.sha256(data).hexdigest() != sha256:
            return None
        with suppress(OSError):  # on a read-only volume the order of use is that of writing
            os.utime(path)
        return data

    def write(self, sha256: str, data: bytes) -> None:
        """Those used longest ago give way to it. A full disk costs the cache, not the version."""
        if 0 < self.budget_bytes < len(data):
            log.warning("the export %s… of %d bytes is more than the cache may hold", sha256[:12], len(data))
            return
        try:
            if self.budget_bytes:
                self._make_room(self.budget_bytes - len(data))
            self._write(self.folder / f"{sha256}.onnx", data)
        except OSError as error:
            log.warning("the export %s… cannot be kept in %s: %s", sha256[:12], self.folder, error)

    def remember(self, wanted: Wanted, sha256: str) -> None:
        """Notes what an alias has now; an export that no alias had for a day is removed."""
        key, value = f"{wanted.tenant}/{wanted.alias}", [wanted.version, sha256]
        before = self._known.get(key)
        if before == value:
            return
        self._known[key] = value
        self._save(before[1] if before else "")

    def forget(self, tenant: str, alias: str) -> None:
        """The alias is gone from the registry: no start serves it again, and its export goes after a day like any other."""
        if (before := self._known.pop(f"{tenant}/{alias}", None)) is not None:
            self._save(before[1])

    def _save(self, left: str) -> None:
        """left: hash of the export that an alias left; its day begins now."""
        try:
            self._write(self.index, json.dumps(self._known, indent=1, sort_keys=True).encode())
            with suppress(FileNotFoundError):
                os.utime(self.folder / f"{left}.onnx")
            kept = {digest for _, digest in self._known.values()}
            for used, _, path in self._files():
                if path.stem not in kept and time.time() - used > KEPT_S:
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be written: %s", self.index, error)

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of the exports and of what a process that was killed left half-written; oldest use first."""
        files = []
        for path in (*self.folder.glob("*.onnx"), *self.folder.glob(f"*{PART}")):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        return sorted(files)

    def _make_room(self, budget_bytes: int) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= budget_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size
            log.info("%s left the cache, used longest ago", path.name)

    def _write(self, path: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=self.folder, suffix=PART, delete=False)  # noqa: SIM115 (renamed, or removed below)
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).rename(path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise
