"""Who moved a tenant's champion, when and why: one run per promotion in MLflow's experiment `promotions`.

The service writes there too, when it notices that somebody moved the alias in MLflow's UI: services/inference/mlflow_registry.py.
"""

import getpass
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities import Run as MLflowRun

from training import tracking

EXPERIMENT = "promotions"
BY_HAND, PROMOTED, ROLLED_BACK = "alias moved by hand", "bit promote", "bit promote --rollback"
NONE = "none"  # the version before the first


@dataclass(frozen=True)
class Entry:
    """One line of the history. moved: false where a gate held the alias back, or the promotion was killed before it moved."""

    when: datetime
    before: str
    after: str
    who: str
    how: str
    why: str
    moved: bool
    figures: dict[str, float]


def read(client: MlflowClient, tenant: str) -> list[Entry]:
    """A tenant's history, newest first."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    order = ["attributes.start_time DESC"]
    wanted = f"tags.tenant = {tracking.quoted(tenant)}"
    runs = client.search_runs([experiment.experiment_id], wanted, order_by=order, max_results=1000)
    champion = tracking.version_at(client, tenant, tracking.CHAMPION)
    return [_entry(run, str(champion.version) if champion else NONE) for run in runs]


def before(entries: list[Entry], champion: str) -> str | None:
    """The version that `champion` replaced, None where it was the first. Rollbacks are steps back, not replacements."""
    found = next((e for e in entries if e.moved and e.after == champion and e.how != ROLLED_BACK), None)
    return None if found is None or found.before == NONE else found.before


def notice(uri: str, client: MlflowClient, tenant: str, champion: str | None) -> None:
    """Writes down a move that nobody wrote: made in MLflow's UI while no service was looking."""
    if champion is None:
        return
    last = next((entry for entry in read(client, tenant) if entry.moved), None)
    if last is None or last.after != champion:
        told = {"from": last.after if last else NONE, "to": champion, "why": "noticed by bit promote"}
        with record(uri, client, tenant, told, BY_HAND, who="unknown"):
            pass


@contextmanager
def record(
    uri: str, client: MlflowClient, tenant: str, told: Mapping[str, str], how: str, who: str | None = None
) -> Iterator[tracking.Run]:
    """A run around a promotion: FINISHED where the alias moved, FAILED where the body raised.

    told: from, to (versions) and why. These are tags, which are there from the run's first moment: nobody reads half a promotion.
    """
    experiment = tracking.ensure_experiment(client, uri, EXPERIMENT)
    tags = {"tenant": tenant, "stage": "promote", "how": how, "mlflow.user": who or _user(), **told}
    run = client.create_run(experiment, int(time.time() * 1000), tags, f"{tenant} {told['from']} → {told['to']}")
    try:
        yield tracking.Run(client, run.info.run_id, run.info.artifact_uri or "")
    except BaseException:  # Ctrl-C too moved nothing
        client.set_terminated(run.info.run_id, "FAILED")
        raise
    client.set_terminated(run.info.run_id, "FINISHED")


def _entry(run: MLflowRun, champion: str) -> Entry:
    """A run that did not end (its process was killed) moved the alias where the alias is there."""
    tags, status = run.data.tags, run.info.status
    return Entry(
        when=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        before=tags.get("from", NONE),
        after=tags.get("to", NONE),
        who=tags.get("mlflow.user", "unknown"),
        how=tags.get("how", ""),
        why=tags.get("why", ""),
        moved=status == "FINISHED" or (status == "RUNNING" and tags.get("to") == champion),
        figures=dict(run.data.metrics),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
