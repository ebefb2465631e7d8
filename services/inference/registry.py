"""Where versions come from: MLflow's registry over REST, or a folder of exports. Two implementations of one seam."""

import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from services.inference.errors import Refused

ALIASES = ("champion", "challenger")
UPSTREAM_MODEL = "bit-upstream"  # weights for training, nothing to serve
EXPORT = "model.onnx"


class RegistryDown(Exception):
    """The registry does not answer; what is served stays."""


@dataclass(frozen=True)
class Wanted:
    """A version that an alias points to."""

    tenant: str
    alias: str
    version: str


class Registry(Protocol):
    """All methods may raise RegistryDown; `fetch` also Refused."""

    def poll(self) -> set[Wanted]:
        """What should be served."""

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        """The export of a version and its sha256, which has been checked."""

    def report(self, wanted: Wanted, state: str) -> None:
        """Tells the person who promoted a version what became of it."""


class FolderRegistry:
    """`<tenant>.onnx` files in a folder, each the champion of its tenant; the version is the start of the file's sha256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes: dict[tuple[Path, int, int], str] = {}

    def poll(self) -> set[Wanted]:
        try:
            return {Wanted(path.stem, "champion", self._sha256(path)[:12]) for path in self.folder.glob("*.onnx")}
        except OSError as error:
            raise RegistryDown(f"{self.folder} cannot be read: {error}") from error

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        data = (self.folder / f"{wanted.tenant}.onnx").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if not digest.startswith(wanted.version):
            raise RegistryDown(f"{wanted.tenant}.onnx is being replaced")  # looked at again with the next poll
        return data, digest

    def report(self, wanted: Wanted, state: str) -> None:
        """A folder has no place for notes: the log and the API say it."""

    def _sha256(self, path: Path) -> str:
        """Read again only when size or time of change differ."""
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._hashes:
            with path.open("rb") as file:
                self._hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[key]


class MLflowRegistry:
    """MLflow's registry. One request answers for all tenants; an alias that moved shows as another version."""

    def __init__(self, uri: str, cache_dir: Path, write_back: bool) -> None:
        self.cache_dir, self.write_back = cache_dir, write_back
        self.http = httpx.Client(base_url=uri.rstrip("/"), timeout=httpx.Timeout(10, read=120))

    def poll(self) -> set[Wanted]:
        wanted, token = set(), ""
        while True:
            query = {"max_results": 1000, **({"page_token": token} if token else {})}
            page = self._get("/api/2.0/mlflow/registered-models/search", query).json()
            for model in page.get("registered_models", []):
                for alias in model.get("aliases", []):
                    if alias["alias"] in ALIASES and model["name"] != UPSTREAM_MODEL:
                        wanted.add(Wanted(model["name"], alias["alias"], str(alias["version"])))
            token = page.get("next_page_token", "")
            if not token:
                return wanted

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        query = {"name": wanted.tenant, "version": wanted.version}
        found = self._get("/api/2.0/mlflow/model-versions/get", query).json()["model_version"]
        tags = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
        if tags.get("validation") != "passed":
            raise Refused("the version has no tag validation=passed: nobody checked its export")
        expected = tags.get("sha256", "")
        if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
            raise Refused("the version has no tag sha256, so its export cannot be verified")
        return self._export(query, expected), expected

    def report(self, wanted: Wanted, state: str) -> None:
        if self.write_back:
            tag = {"name": wanted.tenant, "version": wanted.version, "key": "serving.state", "value": state}
            self._send("POST", "/api/2.0/mlflow/model-versions/set-tag", json=tag)

    def _export(self, query: dict[str, str], expected: str) -> bytes:
        """From the cache by its hash, else from MLflow; whatever doesn't hash to `expected` is not kept."""
        cached = self.cache_dir / f"{expected}.onnx"
        if cached.is_file():
            data = cached.read_bytes()
            if hashlib.sha256(data).hexdigest() == expected:
                return data
        data = self._get("/model-versions/get-artifact", query | {"path": EXPORT}).content
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise Refused(f"the export hashes to {digest[:12]}…, the version's tag sha256 says {expected[:12]}…")
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.cache_dir, delete=False) as file:
            file.write(data)
        Path(file.name).rename(cached)
        return data

    def _get(self, path: str, query: dict[str, object] | dict[str, str]) -> httpx.Response:
        return self._send("GET", path, params=query)

    def _send(self, method: str, path: str, **content: object) -> httpx.Response:
        try:
            response = self.http.request(method, path, **content)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            raise RegistryDown(f"MLflow does not answer: {error}") from error
        if response.status_code in (400, 404):
            raise Refused(f"MLflow has no {path.rsplit('/', 1)[-1]} for it (status {response.status_code})")
        if response.is_error:
            raise RegistryDown(f"MLflow answered {response.status_code} to {path}")
        return response


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
