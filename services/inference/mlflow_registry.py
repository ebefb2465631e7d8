"""Versions from MLflow's registry, over its REST API: one request answers for all tenants."""

import hashlib
import os
import time
from typing import Any

import httpx

from services.inference import states
from services.inference.aliases import ALIASES, CHAMPION, Wanted
from services.inference.cache import Cache
from services.inference.errors import Refused
from services.inference.registry import RegistryDown

UPSTREAM_MODEL = "bit-upstream"  # weights for training, nothing to serve
PROMOTIONS = "promotions"  # experiment that holds the history of every tenant's champion
EXPORT = "model.onnx"
STATE = "serving.state"
API = "/api/2.0/mlflow"
REFUSALS = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")  # MLflow's error codes
TOGETHER_MS = 60_000  # instances that write the same promotion within this have seen the same one
EMPTY_BELIEVED_S = 300.0  # an account that lost its rights, or a fresh database, answers like a registry without models


class MLflowRegistry:
    """MLflow's registry. One request answers for all tenants; an alias that moved shows as another version.

    write_back: whether the account may write (tag `serving.state`, history of promotions); reading is enough without it.
    believe_empty_s: how long no alias at all must be seen before that is true.
    """

    def __init__(self, uri: str, cache: Cache, write_back: bool, believe_empty_s: float = EMPTY_BELIEVED_S) -> None:
        self.write_back, self.cache, self.believe_empty_s = write_back, cache, believe_empty_s
        self.http = httpx.Client(base_url=uri.rstrip("/"), timeout=httpx.Timeout(10, read=120), auth=_account())
        self._tags: dict[tuple[str, str], dict[str, str]] = {}
        self._had_some = False
        self._empty_since: float | None = None

    def poll(self) -> set[Wanted]:
        """Raises RegistryDown also for an answer that isn't MLflow's, and where all aliases vanished at once, at first."""
        empty_since, self._empty_since = self._empty_since, None  # an answer that fails, or shows some, begins anew
        try:
            wanted = self._aliases()
        except (Refused, KeyError, TypeError, AttributeError) as error:
            raise RegistryDown(f"what answers at {self.http.base_url} is no registry of MLflow: {error!r}") from error
        if wanted:
            self._had_some = True
        elif self._had_some or self.cache.remembered():
            now = time.monotonic()
            self._empty_since = empty_since or now
            if now - self._empty_since < self.believe_empty_s:
                raise RegistryDown(
                    "MLflow shows no alias any more, of any model: is the database another one, may the account still read? "
                    f"Believed when it lasts {self.believe_empty_s:g} s"
                )
        self._tags = {key: tags for key, tags in self._tags.items() if any(_is(w, key) for w in wanted)}
        return wanted

    def _aliases(self) -> set[Wanted]:
        wanted, token = set(), ""
        while True:
            query = {"max_results": 1000, **({"page_token": token} if token else {})}
            page = self._get(f"{API}/registered-models/search", query)
            for model in page.get("registered_models", []):
                for alias in model.get("aliases", []):
                    if alias["alias"] in ALIASES and model["name"] != UPSTREAM_MODEL:
                        wanted.add(Wanted(model["name"], alias["alias"], str(alias["version"])))
            token = page.get("next_page_token", "")
            if not token:
                return wanted

    def remembered(self) -> set[Wanted]:
        return self.cache.remembered()

    def size_bytes(self, wanted: Wanted) -> int:
        """Also looks at the version's tags anew: who was refused for a missing one may have it now."""
        self._tags.pop((wanted.tenant, wanted.version), None)
        try:
            self._expected_sha256(wanted)
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
        data = self._send("GET", "/model-versions/get-artifact", params=query).content
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected:
            self._tags.pop((wanted.tenant, wanted.version), None)
            raise Refused(f"the export hashes to {digest[:12]}…, the version's tag sha256 says {expected[:12]}…")
        self.cache.write(expected, data)
        return data, expected

    def report(self, wanted: Wanted, state: str) -> None:
        kind = states.kind(state)
        if kind in states.SERVED:
            self.cache.remember(wanted, self._expected_sha256(wanted))
        if not self.write_back:
            return
        tags = self._tags_of(wanted)
        if kind not in states.KEPT.get(states.kind(tags.get(STATE, "")), ()):
            tag = {"name": wanted.tenant, "version": wanted.version, "key": STATE, "value": state}
            self._send("POST", f"{API}/model-versions/set-tag", json=tag)
            tags[STATE] = state
        if wanted.alias == CHAMPION and kind in (states.LIVE, states.COLD):
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
        run_id = self._post("runs/create", run)["run"]["info"]["run_id"]
        ended = {"run_id": run_id, "status": "FINISHED", "end_time": now_ms}
        self._post("runs/update", ended)
        # The last one before it only: v1 → v2, back, and v1 → v2 again are three moves, however quick.
        earlier = [entry for entry in self._history(experiment, wanted) if entry[:2] < (now_ms, run_id)]
        start, _, told = max(earlier, key=lambda entry: entry[:2], default=(0, "", {}))
        if now_ms - start < TOGETHER_MS and move.items() <= told.items():
            self._post("runs/delete", {"run_id": run_id})

    def _is_champion(self, wanted: Wanted) -> bool:
        """Whether the alias is still there: a slow instance must not write down a move that is history already."""
        query = {"name": wanted.tenant, "alias": CHAMPION}
        found = self._get(f"{API}/registered-models/alias", query)["model_version"]
        return str(found["version"]) == wanted.version

    def _promotions(self) -> str:
        """Id of the experiment that holds the history."""
        path, query = f"{API}/experiments/get-by-name", {"experiment_name": PROMOTIONS}
        try:
            return self._get(path, query)["experiment"]["experiment_id"]
        except Refused:
            pass
        try:
            return self._post("experiments/create", {"name": PROMOTIONS})["experiment_id"]
        except Refused:  # another instance was first
            return self._get(path, query)["experiment"]["experiment_id"]

    def _history(self, experiment: str, wanted: Wanted) -> list[tuple[int, str, dict[str, str]]]:
        """(start in ms, run id, tags) of a tenant's latest promotions, newest first.

        A run that did not end yet, or never will, counts where it is about the version that is champion now.
        """
        quote = '"' if "'" in wanted.tenant else "'"  # MLflow's filters know no escape, and refuse a name with both
        mine = f"tags.tenant = {quote}{wanted.tenant}{quote}"
        query = {
            "experiment_ids": [experiment],
            "filter": f"{mine} and attributes.status != 'FAILED'",  # a gate held those back
            "order_by": ["attributes.start_time DESC"],
            "max_results": 20,
        }
        runs = self._post("runs/search", query).get("runs", [])
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
            found = self._get(f"{API}/model-versions/get", query)["model_version"]
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

    def _get(self, path: str, query: dict[str, Any]) -> Any:
        return _told(self._send("GET", path, params=query))

    def _post(self, what: str, content: dict[str, Any]) -> Any:
        return _told(self._send("POST", f"{API}/{what}", json=content))

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Raises Refused where MLflow itself says that there is no such thing, RegistryDown for all else but success."""
        try:
            response = self.http.request(method, path, **content)
        except httpx.HTTPError as error:
            raise RegistryDown(f"MLflow does not answer: {error}") from error
        if response.is_success:
            return response
        # A proxy on the way has pages of its own for 400 and 404.
        if response.status_code in (400, 404) and _told(response).get("error_code") in REFUSALS:
            raise Refused(f"MLflow has no {path.rsplit('/', 1)[-1]} for it (status {response.status_code})")
        raise RegistryDown(f"MLflow answered {response.status_code} to {path}")


def _told(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object. Raises RegistryDown for anything else: a login page, say."""
    try:
        told = response.json()
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise RegistryDown(f"{response.url.path} was answered {response.status_code} without JSON: is it MLflow?")
    return told


def _account() -> tuple[str, str] | None:
    """MLflow's own variables for basic auth."""
    user, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    return (user, password) if user and password else None


def _is(wanted: Wanted, key: tuple[str, str]) -> bool:
    return (wanted.tenant, wanted.version) == key
