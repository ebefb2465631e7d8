"""receipt.json: what a stage did and where its result is. The next stage reads this, never a guessed path."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict

from training.config import ConfigError, Section

FILE = "receipt.json"
FETCHED = Path(".fetched")  # artifacts that lay elsewhere, by hash


class Artifact(BaseModel):
    """A file or folder that a stage made. uri: path from the project's root, or any fsspec URL."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    sha256: str
    size_bytes: int


class Receipt(BaseModel):
    """inputs: name → hash of each input; outputs: name → artifact; details: what else the next stage must know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    tenant: str | None
    config_hash: str
    inputs: dict[str, str]
    run_id: str
    outputs: dict[str, Artifact] = {}
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}

    def write(self, folder: Path) -> None:
        """receipt.json and, for DVC, metrics.json; each appears whole or not at all."""
        _write_json(folder / "metrics.json", self.metrics)
        _write_json(folder / FILE, self.model_dump())


def folder(stage: str, tenant: str | None = None) -> Path:
    """Where a stage's output lies, from the project's root."""
    if stage == "pack":
        return Path("runs", stage, tenant or "upstream")
    return Path("runs", stage, tenant) if tenant else Path("runs", stage)


def read(stage: str, tenant: str | None = None) -> Receipt:
    """The receipt of a stage. Raises ConfigError when the stage has not run yet."""
    path = folder(stage, tenant) / FILE
    if not path.is_file():
        target = f"tenants/{tenant}/dvc.yaml" if tenant else "dvc.yaml"
        raise ConfigError(f"{path} is not there: run the stage {stage!r} first, or all with `dvc repro {target}`.")
    return Receipt.model_validate_json(path.read_text())


def artifact(path: Path) -> Artifact:
    """A local file as an artifact: hashed in one pass."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Artifact(uri=path.as_posix(), sha256=digest, size_bytes=path.stat().st_size)


def local(made: Artifact) -> Path:
    """The file of an artifact, on this machine's disk: fetched and checked first where it lies elsewhere.

    Raises ConfigError when it isn't there any more, or isn't what the receipt says.
    """
    if "://" not in made.uri:
        return Path(made.uri)
    path = FETCHED / made.sha256 / made.uri.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with fsspec.open(made.uri, "rb") as remote, temporary.open("wb") as file:
                shutil.copyfileobj(remote, file, 2**20)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"{made.uri} cannot be fetched: {error}. Run the stage that made it again.") from error
        digest = artifact(temporary).sha256
        if digest != made.sha256:
            temporary.unlink()
            raise ConfigError(
                f"{made.uri} hashes to {digest}, its receipt says {made.sha256}: it was damaged or replaced."
            )
        temporary.rename(path)
    return path


def hash_of(*values: Section | str | None) -> str:
    """A short hash of config sections and strings: equal where all that decides a result is equal."""
    texts = [value.model_dump_json() if isinstance(value, BaseModel) else str(value) for value in values]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
