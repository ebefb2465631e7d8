"""What is served right now: aliases → versions → sessions in memory, the least recently used giving way where memory is short.

A request sees one version from start to end: it holds the `Served` that it found, whatever is swapped or evicted meanwhile.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from services.inference.aliases import ALIASES, CHAMPION, Wanted
from services.inference.engine import Session
from services.inference.errors import NotFound
from services.inference.tenants import ANYBODY

KEEP_REPLACED_S = 900.0  # a version that was replaced stays warm this long, so that a rollback is instant


@dataclass
class Stats:
    """What a version answered. stages: name → (requests, seconds). Approximate where two threads count at once."""

    pictures: int = 0
    executions: int = 0
    last: float = 0.0
    stages: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        count, total = self.stages.get(stage, (0, 0.0))
        self.stages[stage] = (count + 1, total + seconds)


@dataclass(eq=False)
class Served:
    """One version in memory. size_bytes: what loading it added to the process, at least the file's size.

    alias: the one that it was loaded for, or that left it last.
    """

    tenant: str
    version: str
    sha256: str
    session: Session
    golden_difference: float
    size_bytes: int
    alias: str = CHAMPION
    since: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)
    replaced: float | None = None  # when its last alias left it
    stats: Stats = field(default_factory=Stats)
    series: Any = None  # its metrics, held by tally.py

    def __post_init__(self) -> None:
        """What every answer of this version tells is rendered once: its headers, and its classes as JSON without their end."""
        told = {"x-model-name": self.tenant, "x-model-version": self.version, "x-model-sha256": self.sha256}
        self.headers = [(name.encode(), value.encode()) for name, value in told.items()]
        classes = enumerate(self.session.card.classes)
        self.labels = [orjson.dumps({"class": name, "index": i})[:-1] + b',"probability":' for i, name in classes]


class Cold(Exception):
    """An alias points to the version, but it isn't in memory."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.wanted = wanted


class Models:
    """Lookups by name, for the request path; changes by the follower. Single dict operations are atomic; others take the lock.

    budget_bytes: memory for sessions, 0 for no limit; pinned: tenants whose versions never give way.
    """

    def __init__(self, budget_bytes: int = 0, pinned: Iterable[str] = ()) -> None:
        self.budget_bytes, self.pinned = budget_bytes, frozenset(pinned)
        self._pool: dict[tuple[str, str], Served] = {}
        self._aliases: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()

    def find(self, name: str, version: str | None = None, asker: str = ANYBODY) -> tuple[Served, str]:
        """The version that `<tenant>` or `<tenant>@<alias>` stands for, and the alias (empty where a version was asked for
        that no alias has any more). Raises NotFound with the choices that the asker may see, Cold where it must be loaded first.
        """
        asked = name if version is None else f"{name} version {version}"
        tenant, _, alias = name.partition("@")
        if version is None:
            alias = alias or CHAMPION
            version = self._aliases.get((tenant, alias))
        elif not alias:
            alias = next((a for a in ALIASES if self._aliases.get((tenant, a)) == version), "")
        elif self._aliases.get((tenant, alias)) != version:
            version = None
        if version is not None:
            if served := self._pool.get((tenant, version)):
                served.used = time.monotonic()
                return served, alias
            if alias:
                raise Cold(Wanted(tenant, alias, version))
        shown = self.aliases(tenant) or (self.aliases() if asker == ANYBODY else [])
        known = [f"{w.tenant}@{w.alias} (version {w.version})" for w in shown]
        more = f" and {len(known) - 10} more" if len(known) > 10 else ""
        raise NotFound(f"{asked!r} is not served. Served now: {', '.join(known[:10]) or 'nothing yet'}{more}.")

    def aliases(self, tenant: str | None = None) -> list[Wanted]:
        """What the aliases point to, in order."""
        found = sorted(self._aliases.copy().items())
        return [Wanted(t, alias, version) for (t, alias), version in found if tenant in (None, t)]

    def all(self) -> list[Served]:
        """All versions in memory."""
        return sorted(self._pool.copy().values(), key=lambda served: (served.tenant, served.version))

    def get(self, tenant: str, version: str) -> Served | None:
        return self._pool.get((tenant, version))

    @property
    def size_bytes(self) -> int:
        return sum(served.size_bytes for served in self._pool.copy().values())

    def fits(self, size_bytes: int) -> bool:
        """Whether that much more is within the budget without anything giving way."""
        return not self.budget_bytes or self.size_bytes + size_bytes <= self.budget_bytes

    def put(self, served: Served) -> list[Served]:
        """Takes a version into memory; returns those that gave way."""
        with self._lock:
            self._pool[served.tenant, served.version] = served
            self._left(served.tenant, served.alias, served.version)  # its alias may have moved on while it was loading
            return self._evict(served)

    def point(self, wanted: Wanted) -> str | None:
        """Moves an alias; returns the version that had it. The swap: requests from now on find the new version."""
        with self._lock:
            key = (wanted.tenant, wanted.alias)
            old = self._aliases.get(key)
            self._aliases[key] = wanted.version
            if served := self._pool.get((wanted.tenant, wanted.version)):
                served.replaced = None
            self._left(wanted.tenant, wanted.alias, old)
            return old

    def unpoint(self, tenant: str, alias: str) -> None:
        """The alias is gone from the registry."""
        with self._lock:
            self._left(tenant, alias, self._aliases.pop((tenant, alias), None))

    def tidy(self) -> list[Served]:
        """Drops versions that were replaced long ago, or after which their alias left another one too; returns them."""
        with self._lock:
            now, dropped = time.monotonic(), []
            replaced = [s for s in self._pool.values() if s.replaced is not None]
            for served in sorted(replaced, key=lambda s: s.replaced or 0.0):
                same = [other for other in replaced if (other.tenant, other.alias) == (served.tenant, served.alias)]
                newer = any((other.replaced or 0.0) > (served.replaced or 0.0) for other in same)
                if newer or now - (served.replaced or 0.0) > KEEP_REPLACED_S:
                    dropped.append(self._pool.pop((served.tenant, served.version)))
            return dropped

    def drop(self, tenant: str) -> list[Served]:
        """Takes a tenant's versions out of memory; the next request loads again."""
        with self._lock:
            return [self._pool.pop(key) for key in list(self._pool) if key[0] == tenant]

    def _left(self, tenant: str, alias: str, version: str | None) -> None:
        still = any(t == tenant and v == version for (t, _), v in self._aliases.items())
        if version is not None and not still and (served := self._pool.get((tenant, version))):
            served.replaced, served.alias = time.monotonic(), alias

    def _evict(self, newest: Served) -> list[Served]:
        """Replaced versions first, then the least recently used, until the rest is within the budget."""
        gone: list[Served] = []
        if not self.budget_bytes:
            return gone
        order = sorted(self._pool.values(), key=lambda served: (served.replaced is None, served.used))
        total = sum(served.size_bytes for served in order)
        for served in order:
            if total <= self.budget_bytes:
                break
            if served is not newest and served.tenant not in self.pinned:
                gone.append(self._pool.pop((served.tenant, served.version)))
                total -= served.size_bytes
        return gone
