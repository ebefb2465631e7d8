"""MLflow, for all of training: runs, metrics, artifacts, registered versions, aliases. The one importer of mlflow.

promote.py and history.py name its types.
"""

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from training import lineage
from training.config import ConfigError
from training.errors import UserError, outages, reason
from training.outbox import Outbox

UPSTREAM_MODEL = "bit-upstream"
EXPORT = "model.onnx"  # in the artifact folder that a version's source names
LAST_WORD_S = 10.0
CONTINUE_S = 30.0
Known = tuple[str, str, dict[str, int]]  # run id, artifacts' place, the last step of each figure
log = logging.getLogger(__name__)
CHAMPION, CHALLENGER = "champion", "challenger"


class TrackingError(UserError):
    """MLflow does not answer when its answer is needed, or refuses."""


@contextmanager
def asked(uri: str) -> Iterator[None]:
    """Around what needs MLflow's answers. Raises OutageError where MLflow or its store is away now, TrackingError else."""
    try:
        with outages(f"MLflow ({uri})"):
            yield
    except MlflowException as error:
        raise TrackingError(
            f"MLflow ({uri}) refuses: {reason(error)}. Look at its address, your account and the names."
        ) from error


@dataclass(frozen=True)
class Run:
    """One MLflow run of a stage. Without a client (ranks above 0) it records nothing.

    outbox: where a training's figures wait; without one they are sent at once.
    """

    client: MlflowClient | None
    run_id: str
    artifact_uri: str
    outbox: Outbox | None = None

    def metrics(self, figures: Mapping[str, float], step: int = 0) -> None:
        if self.outbox:
            self.outbox.put(figures, step)
        elif self.client:
            now = int(time.time() * 1000)
            self.client.log_batch(self.run_id, [Metric(name, value, now, step) for name, value in figures.items()])

    def delivered(self, timeout_s: float | None = None) -> None:
        """Waits until MLflow has all figures, before results are laid down with it; see `patience_s`. Raises TrackingError."""
        timeout_s = patience_s() if timeout_s is None else timeout_s
        if self.outbox and not self.outbox.flush(timeout_s):
            raise TrackingError(
                f"MLflow did not answer for {timeout_s:g} s. The training has ended and its last checkpoint is kept: start the "
                "same command again when MLflow is back, and it goes on from there."
            )

    def metrics_of(self, series: str) -> Callable[[Mapping[str, float], int], None]:
        """`metrics`, with every name below `series/`: a second curve in the same run."""
        return lambda figures, step: self.metrics({f"{series}/{name}": v for name, v in figures.items()}, step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        if self.client:
            self.client.log_artifact(self.run_id, str(path), folder)

    def register(self, model: str, folder: str, tags: Mapping[str, str]) -> str:
        """The run's artifact folder as a new version of a registered model; returns the version's number.

        The version gets the alias `challenger`: it is on trial until somebody moves `champion` to it.
        """
        assert self.client is not None, "only rank 0 registers"
        ensure_model(self.client, model)
        source = f"{self.artifact_uri or self.client.get_run(self.run_id).info.artifact_uri}/{folder}"
        made = self.client.create_model_version(model, source, self.run_id, tags=dict(tags), await_creation_for=0)
        self.client.set_registered_model_alias(model, CHALLENGER, str(made.version))
        return str(made.version)


@contextmanager
def start(
    uri: str,
    stage: str,
    tenant: str | None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    active: bool = True,
    experiment: str | None = None,
    name: str | None = None,
    *,
    resume: str | None = None,
    outbox: Path | None = None,
) -> Iterator[Run]:
    """A run of `stage` in the experiment of its tenant (or `bit-upstream`); ends FINISHED, FAILED or KILLED.

    active: false on ranks above 0, whose run records nothing; experiment, name: where the run is kept and how it is called
    otherwise; resume: a run that is continued; outbox: folder where figures wait while MLflow is away. To begin a run MLflow
    must answer; to continue one it need not.
    """
    if not active:
        yield Run(None, "", "")
        return
    client = connect(uri)
    all_tags = {"stage": stage, "tenant": tenant or "", "git.commit": lineage.git_commit()}
    all_tags |= {**lineage.cluster_tags(), **tags}
    known = _continued(client, resume, all_tags) if resume else None
    if known is None:
        found = ensure_experiment(client, uri, experiment or tenant or UPSTREAM_MODEL)
        title = name or (f"{stage}-{tenant}" if tenant else stage)
        info = client.create_run(found, run_name=title, tags=all_tags).info
        known = info.run_id, info.artifact_uri or "", {}
        values = [Param(key, str(value)) for key, value in flatten(params).items()]
        client.log_batch(info.run_id, params=values)
    run_id, artifact_uri, reached = known
    box = None
    if outbox:  # a file of the run's own: what is left of another run is none of its business
        path = outbox / f"figures-{run_id}.jsonl"
        box = Outbox(path, lambda batch: client.log_batch(run_id, [Metric(*figure) for figure in batch]))
        for figure, step in reached.items():
            box.reached[figure] = max(step, box.reached.get(figure, -1))
    try:
        yield Run(client, run_id, artifact_uri, box)
    except (KeyboardInterrupt, SystemExit):
        _end(client, run_id, "KILLED")
        raise
    except BaseException:  # whatever ended it, MLflow is not to show it as running for ever
        _end(client, run_id, "FAILED")
        raise
    finally:
        if box:
            box.close()
    _end(client, run_id, "FINISHED", patience_s())


def _continued(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> Known | None:
    """The run as MLflow knows it, None where it has it no more. One that does not answer is not waited for, for its client
    alone would try again for many minutes.
    """
    answers: list[Known | None] = []
    limit_s = min(CONTINUE_S, patience_s())
    thread = threading.Thread(target=lambda: answers.append(_ask(client, run_id, tags)), daemon=True)
    thread.start()
    thread.join(limit_s)
    if not answers:
        log.warning("MLflow did not answer for %g s; training goes on, its figures wait on disk", limit_s)
    return answers[0] if answers else (run_id, "", {})


def _ask(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> Known | None:
    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            return None
        client.update_run(run_id, "RUNNING")
        set_tags(client, run_id, tags)
        reached = {
            name: max(point.step for point in client.get_metric_history(run_id, name)) for name in run.data.metrics
        }
        return run_id, run.info.artifact_uri or "", reached
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        log.warning("MLflow does not answer (%s); training goes on, its figures wait on disk", error)
        return run_id, "", {}


def _end(client: MlflowClient, run_id: str, status: str, limit_s: float = LAST_WORD_S) -> None:
    """Says how a run ended, without failing, or keeping from ending, a process when MLflow is away."""

    def tell() -> None:
        try:
            client.set_terminated(run_id, status)
        except Exception as error:
            log.warning("MLflow was not told that run %s is %s: %s", run_id, status, error)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(limit_s)


def patience_s() -> float:
    """How long a training that has ended waits for MLflow: BIT_MLFLOW_PATIENCE_S, or ten minutes."""
    return float(os.environ.get("BIT_MLFLOW_PATIENCE_S", 600))


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server or database `uri`; the folder of an SQLite file is made when it isn't there."""
    if path := sqlite_path(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri)


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id. Beside an SQLite file the artifacts get their folder next to it; a server knows its own."""
    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    path = sqlite_path(uri)
    location = (path.parent.resolve() / "artifacts" / name).as_uri() if path else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another process was faster
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


def ensure_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def version_at(client: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to, None where the alias (or the model) is not there."""
    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise


def versions(client: MlflowClient, model: str) -> list[ModelVersion]:
    """All versions of a model, newest first."""
    found = client.search_model_versions(f"name = {quoted(model)}")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def quoted(name: str) -> str:
    """A name as MLflow's filters write it. Raises TrackingError for one that they cannot hold."""
    if "'" in name and '"' in name:
        raise TrackingError(f"{name!r} holds both kinds of quotes, which MLflow cannot search for: rename it.")
    return f'"{name}"' if "'" in name else f"'{name}'"


def export_of(client: MlflowClient, version: ModelVersion) -> bytes:
    """The .onnx of a registered version. Raises ConfigError where it does not hash to the version's tag `sha256`."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"{version.source}/{EXPORT}"
        path = download_artifacts(artifact_uri=place, dst_path=folder, tracking_uri=client.tracking_uri)
        data = Path(path).read_bytes()
    digest, expected = hashlib.sha256(data).hexdigest(), version.tags.get("sha256", "nothing")
    if digest != expected:
        raise ConfigError(
            f"the export of {version.name} version {version.version} hashes to {digest[:12]}…, its tag sha256 says "
            f"{expected[:12]}…: it was changed or damaged. Register it again."
        )
    return data


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def note(uri: str, run_id: str, tags: Mapping[str, str]) -> str:
    """Tags of a run that another machine made. Returns why it could not be done: the server of `uri` is not its one, say."""
    try:
        set_tags(connect(uri), run_id, tags)
    except MlflowException as error:
        return error.message
    return ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
