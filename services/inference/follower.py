"""Follows the registry: an alias that moved → fetch, verify, warm up, swap. A version that fails changes nothing.

One niced thread does all loading, so that answering comes first and a version is never loaded twice at once.
"""

import logging
import queue
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from services.inference import states
from services.inference.aliases import CHAMPION, Wanted
from services.inference.backoff import Backoff
from services.inference.engine import Session
from services.inference.errors import NotFound, Refused
from services.inference.memory import Freed, resident_bytes
from services.inference.metrics import Metrics
from services.inference.models import Cold, Models, Served
from services.inference.notes import Notes
from services.inference.priority import give_way
from services.inference.registry import Registry, RegistryDown

log = logging.getLogger("bit.follower")
NICENESS = 15  # loading gives way to answering
UNFORESEEN = "it cannot be loaded; see the log"
PER_PIXEL = 512  # bytes of activations; an R50x1 takes 410 at 224 pixels (measured)


@dataclass
class Follower:
    """A thread that keeps `models` what the registry wants. refused: version → why it isn't served, for now.

    only: tenants to serve, all if empty; retry_s: first pause before a refused version is tried again.
    """

    registry: Registry
    models: Models
    metrics: Metrics
    interval_s: float
    max_batch: int
    only: frozenset[str] = frozenset()
    retry_s: float = 10.0
    refused: dict[Wanted, str] = field(default_factory=dict)
    polled: bool = False  # the registry answered once and everything it wanted then was dealt with

    def __post_init__(self) -> None:
        self._asked: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._loads: dict[tuple[str, str], Future[Served]] = {}
        self._again: dict[Wanted, Backoff] = {}  # one for each of `refused`
        self._cold: set[Wanted] = set()  # in service, though nobody loaded and checked them yet
        self._notes = Notes(self.registry)
        self._freed = Freed()
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._asked.put(None)
        self._thread.join(timeout=5)

    def load(self, cold: Cold) -> Future[Served]:
        """The version, once it is in memory; however many ask, it is loaded once. The future may raise Refused, RegistryDown.

        A version that was refused lately is refused again without a look at it.
        """
        wanted = cold.wanted
        if not self._may_try(wanted):
            told: Future[Served] = Future()
            told.set_exception(Refused(self.refused.get(wanted, "")))
            return told
        key = (wanted.tenant, wanted.version)
        with self._lock:
            future = self._loads.get(key)
            if future is None:
                future = self._loads[key] = Future()
                self._asked.put(wanted)
        return future

    def not_found(self, error: NotFound, name: str) -> NotFound:
        """The error, with the reason where a version of the tenant was refused."""
        tenant = name.partition("@")[0]
        refused = [(item, why) for item, why in list(self.refused.items()) if item.tenant == tenant]
        told = "".join(f" Version {item.version} ({item.alias}) was refused: {why}." for item, why in refused)
        return NotFound(f"{error}{told}")

    def unload(self, tenant: str) -> None:
        """Takes a tenant's versions out of memory; the aliases stay, so that the next request loads again."""
        self._forget(self.models.drop(tenant))

    def look(self) -> None:
        """One look at the registry. Raises RegistryDown, also where it failed for some only: after all others were dealt with."""
        wanted = self._ours(self.registry.poll())
        self._notes.deliver()
        pointed = set(self.models.aliases())
        before = {(w.tenant, w.alias): w for known in (self._ours(self.registry.remembered()), pointed) for w in known}
        for gone in set(before) - {(w.tenant, w.alias) for w in wanted}:
            self.models.unpoint(*gone)
            self.registry.forget(*gone)
            log.info("%s@%s is no longer in the registry: removed", *gone)
            self._leave(before[gone], "none: the alias was removed", wanted)
        for stale in set(self.refused) - wanted:
            self._pardon(stale)
        self._cold &= wanted
        down: RegistryDown | None = None
        for item in sorted(filter(self._may_try, wanted - pointed), key=self._first):
            try:
                self._swap(item, before.get((item.tenant, item.alias)))
            except RegistryDown as error:
                log.warning("%s version %s cannot be had: %s", item.tenant, item.version, error)
                down = down or error
        self._forget(self.models.tidy())
        named = {(item.tenant, item.version) for item in (*wanted, *self.models.aliases())}
        self.metrics.keep(named | {(served.tenant, served.version) for served in self.models.all()})
        if down is not None:
            self.polled = self.polled or bool(self.models.aliases())  # nothing at all is no start
            raise down

    def _ours(self, known: set[Wanted]) -> set[Wanted]:
        return {item for item in known if item.tenant in self.only} if self.only else known

    def _first(self, item: Wanted) -> tuple[bool, bool, str]:
        return item.tenant not in self.models.pinned, item.alias != CHAMPION, item.tenant

    def _swap(self, item: Wanted, before: Wanted | None = None) -> None:
        """Moves the alias once its version is loaded and verified; without memory for it, the first request will load it.

        before: what the alias had when this process, or the one before it, looked last.
        """
        try:
            size_bytes = self.registry.size_bytes(item)
            if self.models.fits(size_bytes) or self.models.get(item.tenant, item.version):
                self._ensure(item)
            elif any((w.tenant, w.alias) == (item.tenant, item.alias) for w in self.models.aliases()):
                self._ensure(item)  # others must give way: what is served now must not turn cold by a promotion
        except Refused as error:
            log.error("%s version %s refused: %s", item.tenant, item.version, error)
            self._refuse(item, str(error))
            return
        except RegistryDown:
            raise
        except Exception:  # what one tenant's version ran into must not keep the others from their turn
            log.exception("%s version %s cannot be loaded", item.tenant, item.version)
            self._refuse(item, UNFORESEEN)
            return
        self._pardon(item)
        old = self.models.point(item)
        self.metrics.swaps.labels(item.tenant).inc()
        log.info("%s@%s is version %s now (before: %s)", item.tenant, item.alias, item.version, old or "none")
        self._tell(item)
        if before is not None and before != item:
            self._leave(before, f"version {item.version}", set(self.models.aliases(item.tenant)))

    def _leave(self, old: Wanted, by: str, pointed: set[Wanted]) -> None:
        """An alias left the version, which may still be the champion."""
        if Wanted(old.tenant, CHAMPION, old.version) not in pointed:
            self._notes.add(old, f"{states.REPLACED} at {states.timestamp()} by {by}")

    def _tell(self, item: Wanted) -> None:
        if self.models.get(item.tenant, item.version):
            state = f"{states.LIVE if item.alias == CHAMPION else states.TRIAL} since {states.timestamp()}"
            self._cold.discard(item)
        else:
            state = f"{states.COLD} since {states.timestamp()}: the first request loads and checks it"
            self._cold.add(item)
        self._notes.add(item, state)

    def _may_try(self, item: Wanted) -> bool:
        return (again := self._again.get(item)) is None or again.over

    def _refuse(self, item: Wanted, why: str) -> None:
        """For a while: the artifact store may have been away, or the tag that was missing is there by then."""
        self._again.setdefault(item, Backoff(self.retry_s)).failed()
        if self.refused.get(item) == why:
            return
        self.refused[item] = why
        self.metrics.refused.labels(item.tenant, item.version).set(1)
        self._notes.add(item, f"{states.REFUSED}: {why} ({states.timestamp()})")

    def _pardon(self, item: Wanted) -> None:
        self._again.pop(item, None)
        if self.refused.pop(item, None) is None:
            return
        if not any((w.tenant, w.version) == (item.tenant, item.version) for w in self.refused):
            self.metrics.refused.remove(item.tenant, item.version)

    def _ensure(self, item: Wanted) -> Served:
        """The version in memory: found there, or loaded."""
        if served := self.models.get(item.tenant, item.version):
            return served
        began, before = time.monotonic(), resident_bytes()
        data, sha256 = self.registry.fetch(item)
        session = Session(data)
        size_bytes = len(data)
        del data
        difference = session.check_golden()
        session.warm_up(self.max_batch)
        self._freed.add(size_bytes)  # the file and what its reading left: 13 MB of a network of 8 MB (measured)
        # What grew meanwhile may be anybody's, bodies of requests say: no more is charged than a network like this can take.
        most = 2 * size_bytes + self.max_batch * session.card.resolution**2 * PER_PIXEL
        size_bytes = max(size_bytes, min(resident_bytes() - before, most))
        served = Served(item.tenant, item.version, sha256, session, difference, size_bytes, item.alias)
        self._forget(self.models.put(served))
        self.metrics.loaded.labels(item.tenant, item.version).set(size_bytes)
        self.metrics.loads.observe(time.monotonic() - began)
        return served

    def _forget(self, gone: list[Served]) -> None:
        for served in gone:
            self.metrics.loaded.remove(served.tenant, served.version)
            log.info("%s version %s left memory", served.tenant, served.version)
            del served  # or the last one would still be held when memory is given back
        size_bytes = sum(one.size_bytes for one in gone)
        gone.clear()
        self._freed.add(size_bytes)

    def _run(self) -> None:
        give_way(NICENESS)
        due = 0.0
        while not self._stopped:
            if time.monotonic() >= due:
                self._look_safely()
                due = time.monotonic() + self.interval_s * random.uniform(0.8, 1.2)  # noqa: S311 (jitter, no secret)
            try:
                asked = self._asked.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                continue
            if asked is not None:
                self._answer(asked)

    def _look_safely(self) -> None:
        try:
            try:
                self.look()
                self.metrics.registry_up.set(1)
                self.polled = True
            except RegistryDown as error:
                self.metrics.registry_up.set(0)
                log.warning("%s; what is served stays", error)
                if not self.polled:
                    self.polled = self._remember()
        except Exception:  # the follower must outlive whatever one look ran into
            log.exception("a look at the registry failed; what is served stays")

    def _remember(self) -> bool:
        """Serves what was served before, from the cache, while the registry is down at the start."""
        remembered = self._ours(self.registry.remembered())
        for item in sorted(filter(self._may_try, remembered - set(self.models.aliases())), key=self._first):
            try:
                self._swap(item)
            except RegistryDown as error:
                log.warning("%s version %s is not in the cache: %s", item.tenant, item.version, error)
        return bool(self.models.aliases())

    def _answer(self, item: Wanted) -> None:
        """A load that a request asked for."""
        result: Served | Exception
        try:
            result = self._ensure(item)
        except (Refused, RegistryDown) as error:  # given to those who wait
            result = error
        except Exception:  # what nobody foresaw must not end the thread that loads for all
            log.exception("%s version %s cannot be loaded", item.tenant, item.version)
            result = Refused(UNFORESEEN)
        with self._lock:
            future = self._loads.pop((item.tenant, item.version))
        waited_for = future.set_running_or_notify_cancel()  # an answer to a future that was cancelled would be an error
        if isinstance(result, Exception):
            log.error("%s version %s cannot be loaded: %s", item.tenant, item.version, result)
            if waited_for:
                future.set_exception(result)
        elif waited_for:
            future.set_result(result)
        if item in self.models.aliases(item.tenant):
            if isinstance(result, Refused):
                self._refuse(item, str(result))
            elif isinstance(result, Served):
                self._pardon(item)
                if item in self._cold:
                    self._tell(item)
        # Its traceback holds this frame, and so the session: a ring that only a collection of garbage would open.
        del result
