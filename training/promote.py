"""Promotion: the alias `champion` moved to a version, after showing what is compared. No stage: a person's decision.

bit promote digits            (the challenger, or the newest version)
bit promote digits --version 3
"""

from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion

from training import tracking
from training.config import ConfigError


@dataclass(frozen=True)
class Promotion:
    """What `bit promote` compared and did. Figures are the version's tags."""

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


def compare(uri: str, tenant: str, version: int | None = None) -> Promotion:
    """Champion and candidate of a tenant. Raises ConfigError where the version isn't there or did not pass."""
    client = tracking.connect(uri)
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


def apply(uri: str, promotion: Promotion) -> None:
    """Moves the alias `champion`; running services follow within seconds."""
    client = tracking.connect(uri)
    client.set_registered_model_alias(promotion.tenant, tracking.CHAMPION, str(promotion.candidate.version))


def _describe(version: ModelVersion | None) -> str:
    if version is None:
        return "none yet"
    tags = version.tags
    accuracy = f"{float(tags['accuracy']):.1%}" if "accuracy" in tags else "unknown"
    arch, data = tags.get("arch", "unknown"), tags.get("dvc.md5", "unknown")[:12]
    return f"version {version.version} · accuracy {accuracy} · arch {arch} · data {data}"
