"""What is served right now: (tenant, alias) → version. Replaced as a whole, so a request sees one version from start to end."""

import time
from dataclasses import dataclass, field

from services.inference.engine import Session
from services.inference.errors import NotFound

CHAMPION = "champion"


@dataclass(frozen=True, eq=False)
class Served:
    """One version in service."""

    tenant: str
    version: str
    alias: str
    sha256: str
    session: Session
    golden_difference: float
    since: float = field(default_factory=time.time)


class Models:
    """Lookups by name, for the request path; changes by the follower. A dict's item assignment is atomic."""

    def __init__(self) -> None:
        self._served: dict[tuple[str, str], Served] = {}

    def put(self, served: Served) -> Served | None:
        """Puts a version into service; returns the one that it replaces."""
        old = self._served.get((served.tenant, served.alias))
        self._served[served.tenant, served.alias] = served
        return old

    def remove(self, tenant: str, alias: str) -> Served | None:
        return self._served.pop((tenant, alias), None)

    def all(self) -> list[Served]:
        return sorted(self._served.values(), key=lambda served: (served.tenant, served.alias))

    def find(self, name: str, version: str | None = None) -> Served:
        """The version that `<tenant>` or `<tenant>@<alias>` stands for. Raises NotFound with the choices."""
        tenant, _, alias = name.partition("@")
        if version is None:
            if served := self._served.get((tenant, alias or CHAMPION)):
                return served
        else:
            for served in self._served.values():
                if served.tenant == tenant and served.version == version and alias in ("", served.alias):
                    return served
        loaded = [f"{served.tenant}@{served.alias} (version {served.version})" for served in self.all()]
        asked = name if version is None else f"{name} version {version}"
        raise NotFound(f"{asked!r} is not served. Served now: {', '.join(loaded[:20]) or 'nothing yet'}.")
