"""Promotion: the alias `champion` moved to a version, once the gates hold. No stage: a person's decision.

bit promote digits                       (the challenger, or the newest version)
bit promote digits --version 3 --why "more pictures of sevens"
bit promote digits --force --why "the old one is wrong about sevens"
bit promote digits --rollback
bit promote digits --history

Both versions answer the same sample first (replay.py); what came out is a run in the experiment `promotions` (history.py),
whether the alias moved or not. The gates' limits stand in params.yaml, section `promote`.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from rich.console import Console
from rich.table import Table

from training import history, replay, tracking
from training.config import Config, ConfigError, PromoteConfig
from training.errors import UserError


class GateError(UserError):
    """A gate held the alias back: nothing was promoted."""


@dataclass(frozen=True)
class Gate:
    """A figure and its limit. least: the limit is the smallest value allowed, not the largest."""

    name: str
    value: float
    limit: float
    least: bool = False

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def line(self) -> str:
        bound = "at least" if self.least else "at most"
        return f"  {'pass' if self.passed else 'FAIL'}  {self.name} {self.value:.3f} ({bound} {self.limit:g})"


def gates(figures: dict[str, float], limits: PromoteConfig) -> list[Gate]:
    """The gates that the figures can be held against: accuracy only where the sample has labels."""
    found = [
        Gate("agreement", figures["agreement"], limits.min_agreement, least=True),
        Gate("latency_ratio", figures["latency_ratio"], limits.max_latency_ratio),
    ]
    if "accuracy.from" in figures:
        drop = round(figures["accuracy.from"] - figures["accuracy.to"], 9)  # .95 - .94 is .01, not more
        found.insert(1, Gate("accuracy_drop", drop, limits.max_accuracy_drop))
    return found


@dataclass(frozen=True)
class Promotion:
    """What is to be compared. Figures of the versions are their tags."""

    tenant: str
    champion: ModelVersion | None
    candidate: ModelVersion

    @property
    def changes(self) -> bool:
        return self.champion is None or self.champion.version != self.candidate.version

    def lines(self) -> list[str]:
        """The comparison as a person reads it."""
        shown = [f"{self.tenant}: champion {_describe(self.champion)}", f"  candidate {_describe(self.candidate)}"]
        if not self.changes:
            shown.append("  the candidate is the champion already: nothing to do")
        return shown


def main(
    config: Config,
    tenant: str,
    version: int | None = None,
    why: str = "",
    force: bool = False,
    pictures: Path | None = None,
) -> list[str]:
    """Compares, records and moves the alias; returns what was done as lines. Raises GateError, ConfigError."""
    if force and not why:
        raise ConfigError("--force needs a reason: --why TEXT. It is kept in the history.")
    uri, client = config.tracking_uri, tracking.connect(config.tracking_uri)
    compared = compare(client, tenant, version)
    said = compared.lines()
    champion, candidate = compared.champion, compared.candidate
    history.notice(uri, client, tenant, str(champion.version) if champion else None)
    if not compared.changes:
        return said
    told = {"from": str(champion.version) if champion else history.NONE, "to": str(candidate.version), "why": why}
    new = _load(client, candidate)
    if champion is None:
        with history.record(uri, client, tenant, told, history.PROMOTED):
            move(client, tenant, candidate, instead_of=None)
        return [*said, "  no champion yet: nothing to hold it against", _moved(candidate)]

    old = _load(client, champion)
    examples, source = replay.sample(tenant, config.promote.sample, pictures, old, new)
    seen = replay.replay(old, new, examples)
    figures = seen.figures()
    judged = gates(figures, config.promote)
    failed = [gate.name for gate in judged if not gate.passed]
    said += [f"  asked both with {source}: {len(seen.flips)} answers flipped", *(gate.line() for gate in judged)]
    told |= {"forced": str(bool(failed) and force), "sample": source, "failed_gates": ", ".join(failed) or "none"}
    with history.record(uri, client, tenant, told, history.PROMOTED) as run, tempfile.TemporaryDirectory() as folder:
        run.metrics(figures)
        if seen.flips:
            sheet = Path(folder, "flips.png")
            seen.contact_sheet(sheet)
            run.artifact(sheet)
        if failed and not force:
            raise GateError(
                "\n".join(said)
                + f"\nchampion stays at version {champion.version}: {' and '.join(failed)} did not hold. "
                f"See run {run.run_id} of the experiment {history.EXPERIMENT!r}"
                + (", with the pictures that flipped" if seen.flips else "")
                + ". Change the limits in params.yaml (promote), or override them: --force --why TEXT."
            )
        move(client, tenant, candidate, instead_of=champion)
    return [*said, _moved(candidate) + (f", forced: {why}" if failed else "")]


def rollback(config: Config, tenant: str, why: str = "") -> list[str]:
    """Moves the alias back to the version that the champion replaced. Raises ConfigError where there is none."""
    uri, client = config.tracking_uri, tracking.connect(config.tracking_uri)
    champion = tracking.version_at(client, tenant, tracking.CHAMPION)
    if champion is None:
        raise ConfigError(f"{tenant!r} has no champion to roll back. Promote a version: `bit promote {tenant}`.")
    history.notice(uri, client, tenant, str(champion.version))
    number = history.before(history.read(client, tenant), str(champion.version))
    if number is None:
        raise ConfigError(
            f"version {champion.version} of {tenant} replaced no other. Choose one: `bit promote {tenant} --version N`."
        )
    target = compare(client, tenant, int(number)).candidate
    told = {"from": str(champion.version), "to": number, "why": why}
    with history.record(uri, client, tenant, told, history.ROLLED_BACK):
        move(client, tenant, target, instead_of=champion)
    return [f"{tenant}: back from version {champion.version}", _moved(target)]


def print_history(config: Config, tenant: str, console: Console) -> None:
    """The tenant's history as a table, newest first."""
    table = Table("when (UTC)", "from", "to", "agreement", "accuracy", "latency", "who", "how", "why")
    for entry in history.read(tracking.connect(config.tracking_uri), tenant):
        told = entry.figures
        accuracy = f"{told['accuracy.from']:.1%} → {told['accuracy.to']:.1%}" if "accuracy.to" in told else ""
        table.add_row(
            f"{entry.when:%Y-%m-%d %H:%M:%S}",
            entry.before,
            entry.after if entry.moved else f"{entry.after} (held back)",
            f"{told['agreement']:.1%}" if "agreement" in told else "",
            accuracy,
            f"× {told['latency_ratio']:.2f}" if "latency_ratio" in told else "",
            entry.who,
            entry.how,
            entry.why,
        )
    console.print(table if table.row_count else f"{tenant}: nothing was promoted yet")


def compare(client: MlflowClient, tenant: str, version: int | None = None) -> Promotion:
    """Champion and candidate of a tenant. Raises ConfigError where the version isn't there or did not pass."""
    known = tracking.versions(client, tenant)
    if not known:
        raise ConfigError(f"MLflow has no version of {tenant!r} yet. Run `dvc repro tenants/{tenant}/dvc.yaml`.")
    by_number = {int(found.version): found for found in known}
    if version is None:
        candidate = tracking.version_at(client, tenant, tracking.CHALLENGER) or known[0]
    elif version in by_number:
        candidate = by_number[version]
    else:
        raise ConfigError(f"{tenant} has no version {version}. Choices: {', '.join(map(str, sorted(by_number)))}.")
    if candidate.tags.get("validation") != "passed":
        raise ConfigError(
            f"version {candidate.version} of {tenant} has no tag validation=passed: its export was never "
            "checked, and the service would refuse it. Choose another version or run the pipeline again."
        )
    return Promotion(tenant, tracking.version_at(client, tenant, tracking.CHAMPION), candidate)


def move(client: MlflowClient, tenant: str, version: ModelVersion, instead_of: ModelVersion | None) -> None:
    """Running services follow within seconds. Raises GateError where `instead_of` isn't the champion any more."""
    compared, now = (
        str(found.version) if found else history.NONE
        for found in (instead_of, tracking.version_at(client, tenant, tracking.CHAMPION))
    )
    if now != compared:
        raise GateError(
            f"the champion of {tenant} was moved by somebody else meanwhile: it is version {now}, what was compared is "
            f"version {compared}. Nothing was moved; run the command again to compare with version {now}."
        )
    client.set_registered_model_alias(tenant, tracking.CHAMPION, str(version.version))


def _load(client: MlflowClient, version: ModelVersion) -> replay.Session:
    return replay.load(tracking.export_of(client, version), f"version {version.version} of {version.name}")


def _moved(version: ModelVersion) -> str:
    return f"  alias champion → version {version.version}"


def _describe(version: ModelVersion | None) -> str:
    if version is None:
        return "none yet"
    tags = version.tags
    accuracy = f"{float(tags['accuracy']):.1%}" if "accuracy" in tags else "unknown"
    arch, data = tags.get("arch", "unknown"), tags.get("dvc.md5", "unknown")[:12]
    return f"version {version.version} · accuracy {accuracy} · arch {arch} · data {data}"
