"""Follows the registry: an alias that moved → fetch, verify, warm up, swap. A version that fails changes nothing."""

import gc
import logging
import os
import random
import threading
from dataclasses import dataclass, field

from services.inference.engine import Session
from services.inference.errors import Refused
from services.inference.metrics import Metrics
from services.inference.models import CHAMPION, Models, Served
from services.inference.registry import Registry, RegistryDown, Wanted, timestamp

log = logging.getLogger("bit.follower")
NICENESS = 10  # loading gives way to answering


@dataclass
class Follower:
    """A thread that keeps `models` what the registry wants. refused: version → why it isn't served."""

    registry: Registry
    models: Models
    metrics: Metrics
    interval_s: float
    max_batch: int
    refused: dict[Wanted, str] = field(default_factory=dict)
    polled: bool = False  # the registry answered once and everything it wanted then was dealt with

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def look(self) -> None:
        """One look at the registry. Raises RegistryDown."""
        wanted = self.registry.poll()
        for gone in [served for served in self.models.all() if not self._still(served, wanted)]:
            self.models.remove(gone.tenant, gone.alias)
            self.metrics.loaded.remove(gone.tenant, gone.version)
            log.info("%s@%s is no longer in the registry: removed", gone.tenant, gone.alias)
        for stale in set(self.refused) - wanted:
            del self.refused[stale]
            self.metrics.refused.labels(stale.tenant, stale.version).set(0)
        served_now = {Wanted(served.tenant, served.alias, served.version) for served in self.models.all()}
        for item in sorted(wanted - served_now - set(self.refused), key=_champions_first):
            self._swap(item)

    @staticmethod
    def _still(served: Served, wanted: set[Wanted]) -> bool:
        return any(item.tenant == served.tenant and item.alias == served.alias for item in wanted)

    def _swap(self, item: Wanted) -> None:
        try:
            served = self._load(item)
        except Refused as error:
            self.refused[item] = str(error)
            self.metrics.refused.labels(item.tenant, item.version).set(1)
            log.error("%s version %s refused: %s", item.tenant, item.version, error)
            self._report(item, f"refused: {error} ({timestamp()})")
            return
        old = self.models.put(served)
        if old is not None and old.version != served.version and not self._used(old):
            self.metrics.loaded.remove(old.tenant, old.version)
        self.metrics.loaded.labels(item.tenant, item.version).set(served.session.size_bytes)
        self.metrics.swaps.labels(item.tenant).inc()
        log.info("%s@%s is version %s now", item.tenant, item.alias, item.version)
        state = "live" if item.alias == CHAMPION else "on trial"
        self._report(item, f"{state} since {timestamp()}")
        del old
        gc.collect()

    def _report(self, item: Wanted, state: str) -> None:
        """A note that cannot be written (a read-only account, say) keeps no version from being served."""
        try:
            self.registry.report(item, state)
        except (RegistryDown, Refused) as error:
            log.warning("%s version %s: cannot write %r back: %s", item.tenant, item.version, state, error)

    def _used(self, old: Served) -> bool:
        return any(served.tenant == old.tenant and served.version == old.version for served in self.models.all())

    def _load(self, item: Wanted) -> Served:
        """A verified, warm version. One that another alias serves already is shared, not loaded twice."""
        for served in self.models.all():
            if served.tenant == item.tenant and served.version == item.version:
                return Served(
                    item.tenant, item.version, item.alias, served.sha256, served.session, served.golden_difference
                )
        data, sha256 = self.registry.fetch(item)
        session = Session(data)
        difference = session.check_golden()
        session.warm_up(self.max_batch)
        return Served(item.tenant, item.version, item.alias, sha256, session, difference)

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            try:
                self.look()
                self.metrics.registry_up.set(1)
                self.polled = True
            except RegistryDown as error:
                self.metrics.registry_up.set(0)
                log.warning("%s; what is served stays", error)
            except Exception:  # the follower must outlive whatever one look ran into
                log.exception("a look at the registry failed; what is served stays")
            if self._stop.wait(self.interval_s * random.uniform(0.8, 1.2)):  # noqa: S311 (jitter, not a secret)
                return


def _champions_first(item: Wanted) -> tuple[bool, str]:
    return item.alias != CHAMPION, item.tenant
