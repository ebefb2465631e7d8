"""Versions from MLflow's registry, over its REST API: one request answers for all tenants."""

import hashlib
import os
import time
from typing import Any

import httpx

from services.inference.aliases import ALIASES, CHAMPION, Wanted
from services.inference.cache import Cache
from services.inference.errors import Refused
from services.inference.registry import RegistryDown

UPSTREAM_MODEL = "bit-upstream"  # weights for training, nothing to serve
PROMOTIONS = "promotions"  # experiment that holds the history of every tenant's champion
EXPORT = "model.onnx"
API = "/api/2.0/mlflow"
TOGETHER_MS = 60_000  # instances that write the same promotion within this have seen the same one


class MLflowRegistry:
    """MLflow's registry. One request answers for all tenants; an alias that moved shows as another version.

    write_back: whether the account may write (tag `serving.state`, history of promotions); reading is enough without it.
    """

    def __init__(self, uri: str, cache: Cache, write_back: bool) -> None:
        self.write_back, self.cache = write_back, cache
        self.http = httpx.Client(base_url=uri.rstrip("/"), timeout=httpx.Timeout(10, read=120), auth=_account())
        self._tags: dict[tuple[str, str], dict[str, str]] = {}

    def poll(self) -> set[Wanted]:
        wanted, token = set(), ""
        while True:
            query = {"max_results": 1000, **({"page_token": token} if token else {})}
            page = self._get(f"{API}/registered-models/search", query).json()
            for model in page.get("registered_models", []):
                for alias in model.get("aliases", []):
                    if alias["alias"] in ALIASES and model["name"] != UPSTREAM_MODEL:
                        wanted.add(Wanted(model["name"], alias["alias"], str(alias["version"])))
            token = page.get("next_page_token", "")
            if not token:
                self._tags = {key: tags for key, tags in self._tags.items() if any(_is(w, key) for w in wanted)}
                return wanted

    def remembered(self) -> set[Wanted]:
        return self.cache.remembered()

    def size_bytes(self, wanted: Wanted) -> int:
        try:
            size = self._tags_of(wanted).get("size_bytes", "0")
        except RegistryDown:
            return self.cache.size_bytes(self._known_sha256(wanted))
        return int(size) if size.isdigit() else 0

    def fetch(self, wanted: Wanted) -> tuple[bytes, str]:
        """From the cache by its hash, else from MLflow; whatever doesn't hash to the tag `sha256` is not kept."""
        try:
            expected = self._expected_sha256(wanted)
        except RegistryDown:
            expected = self._known_sha256(wanted)
        if (cached := self.cache.read(expected)) is not None:
            return cached, expected
        query = {"name": wanted.tenant, "version": wanted.version, "path": EXPORT}
        data = self._get("/model-versions/get-artifact", query).content
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            raise Refused(f"the export hashes to {digest[:12]}…, the version's tag sha256 says {expected[:12]}…")
        self.cache.write(expected, data)
        return data, expected

    def report(self, wanted: Wanted, state: str) -> None:
        if not state.startswith("refused"):
            self.cache.remember(wanted, self._expected_sha256(wanted))
        if not self.write_back:
            return
        tag = {"name": wanted.tenant, "version": wanted.version, "key": "serving.state", "value": state}
        self._send("POST", f"{API}/model-versions/set-tag", json=tag)
        if wanted.alias == CHAMPION and state.startswith("live"):
            self._record(wanted)

    def forget(self, tenant: str, alias: str) -> None:
        self.cache.forget(tenant, alias)

    def _record(self, wanted: Wanted) -> None:
        """Writes a promotion that nobody wrote down (an alias moved by hand in the UI) into the history.

        Of several instances that notice it at once, all but the first take theirs back.
        """
        experiment = self._promotions()
        known = self._history(experiment, wanted)
        before = known[0][2].get("to", "none") if known else "none"
        if before == wanted.version or not self._is_champion(wanted):
            return
        now_ms = int(time.time() * 1000)
        # Tags only: they are there from the run's first moment, so that no instance reads half a promotion.
        move = {"from": before, "to": wanted.version, "why": "noticed by the service"}
        who = {"how": "alias moved by hand", "mlflow.user": "unknown"}
        tags = {"tenant": wanted.tenant, "stage": "promote", **who, **move}
        run = {
            "experiment_id": experiment,
            "run_name": f"{wanted.tenant} {before} → {wanted.version}",
            "start_time": now_ms,
            "tags": [{"key": key, "value": value} for key, value in tags.items()],
        }
        run_id = self._send("POST", f"{API}/runs/create", json=run).json()["run"]["info"]["run_id"]
        ended = {"run_id": run_id, "status": "FINISHED", "end_time": now_ms}
        self._send("POST", f"{API}/runs/update", json=ended)
        history = self._history(experiment, wanted)
        same = [(start, other) for start, other, told in history if move.items() <= told.items()]
        if any(now_ms - start < TOGETHER_MS and (start, other) < (now_ms, run_id) for start, other in same):
            self._send("POST", f"{API}/runs/delete", json={"run_id": run_id})

    def _is_champion(self, wanted: Wanted) -> bool:
        """Whether the alias is still there: a slow instance must not write down a move that is history already."""
        query = {"name": wanted.tenant, "alias": CHAMPION}
        found = self._get(f"{API}/registered-models/alias", query).json()["model_version"]
        return str(found["version"]) == wanted.version

    def _promotions(self) -> str:
        """Id of the experiment that holds the history."""
        found = self._get(f"{API}/experiments/get-by-name", {"experiment_name": PROMOTIONS}, missing=True)
        if found is not None:
            return found.json()["experiment"]["experiment_id"]
        try:
            return self._send("POST", f"{API}/experiments/create", json={"name": PROMOTIONS}).json()["experiment_id"]
        except Refused:  # another instance was first
            found = self._get(f"{API}/experiments/get-by-name", {"experiment_name": PROMOTIONS})
            return found.json()["experiment"]["experiment_id"]

    def _history(self, experiment: str, wanted: Wanted) -> list[tuple[int, str, dict[str, str]]]:
        """(start in ms, run id, tags) of a tenant's latest promotions, newest first.

        A run that did not end yet, or never will, counts where it is about the version that is champion now.
        """
        query = {
            "experiment_ids": [experiment],
            "filter": f"tags.tenant = '{wanted.tenant}' and attributes.status != 'FAILED'",  # a gate held those back
            "order_by": ["attributes.start_time DESC"],
            "max_results": 20,
        }
        runs = self._send("POST", f"{API}/runs/search", json=query).json().get("runs", [])
        found = []
        for run in runs:
            info, tags = run["info"], {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
            if info["status"] == "FINISHED" or (info["status"] == "RUNNING" and tags.get("to") == wanted.version):
                found.append((int(info["start_time"]), str(info["run_id"]), tags))
        return found

    def _tags_of(self, wanted: Wanted) -> dict[str, str]:
        key = (wanted.tenant, wanted.version)
        if key not in self._tags:
            query = {"name": wanted.tenant, "version": wanted.version}
            found = self._get(f"{API}/model-versions/get", query).json()["model_version"]
            self._tags[key] = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
        return self._tags[key]

    def _expected_sha256(self, wanted: Wanted) -> str:
        tags = self._tags_of(wanted)
        if tags.get("validation") != "passed":
            raise Refused("the version has no tag validation=passed: nobody checked its export")
        expected = tags.get("sha256", "")
        if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
            raise Refused("the version has no tag sha256, so its export cannot be verified")
        return expected

    def _known_sha256(self, wanted: Wanted) -> str:
        known = self.cache.sha256_of(wanted)
        if known is None:
            raise RegistryDown("MLflow does not answer, and the version was never served here")
        return known

    def _get(self, path: str, query: dict[str, Any], missing: bool = False) -> Any:
        return self._send("GET", path, missing=missing, params=query)

    def _send(self, method: str, path: str, missing: bool = False, **content: Any) -> Any:
        """missing: whether 404 is an answer (None) rather than a refusal."""
        try:
            response = self.http.request(method, path, **content)
        except httpx.HTTPError as error:
            raise RegistryDown(f"MLflow does not answer: {error}") from error
        if response.status_code == 404 and missing:
            return None
        if response.status_code in (400, 404):
            raise Refused(f"MLflow has no {path.rsplit('/', 1)[-1]} for it (status {response.status_code})")
        if response.is_error:
            raise RegistryDown(f"MLflow answered {response.status_code} to {path}")
        return response


def _account() -> tuple[str, str] | None:
    """MLflow's own variables for basic auth."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    return (user, password) if user and password else None


def _is(wanted: Wanted, key: tuple[str, str]) -> bool:
    return (wanted.tenant, wanted.version) == key
