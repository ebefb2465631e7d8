"""What became of versions, told to the registry; what it cannot take now is told later."""

import logging

from services.inference.aliases import Wanted
from services.inference.backoff import Backoff
from services.inference.errors import Refused
from services.inference.registry import Registry, RegistryDown

log = logging.getLogger("bit.notes")
MOST = 1000  # notes that wait; the oldest are dropped
PAUSE_S, LONGEST_S = 1.0, 300.0  # a read-only account is no reason to ask for ever


class Notes:
    """No note that cannot be written (MLflow answers 503, the account is read-only) keeps a version from being served."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.waiting: dict[Wanted, str] = {}  # the newest state of each
        self._backoff = Backoff(PAUSE_S, LONGEST_S)

    def add(self, wanted: Wanted, state: str) -> None:
        self.waiting.pop(wanted, None)
        if why := self._told(wanted, state):
            log.warning("%s version %s: cannot write %r back yet: %s", wanted.tenant, wanted.version, state, why)
            self.waiting[wanted] = state
            for oldest in list(self.waiting)[:-MOST]:
                del self.waiting[oldest]

    def deliver(self) -> None:
        """Another try for those that wait, oldest first, up to the first that fails again."""
        if not self.waiting or not self._backoff.over:
            return
        for wanted, state in list(self.waiting.items()):
            if self._told(wanted, state):
                self._backoff.failed()
                return
            del self.waiting[wanted]
        self._backoff = Backoff(PAUSE_S, LONGEST_S)

    def _told(self, wanted: Wanted, state: str) -> str:
        """Why it must be tried again, empty where it need not."""
        try:
            self.registry.report(wanted, state)
        except RegistryDown as error:
            return str(error)
        except Refused as error:
            log.warning("%s version %s: cannot write %r back: %s", wanted.tenant, wanted.version, state, error)
        except Exception:  # what nobody foresaw will not go away by another try
            log.exception("%s version %s: cannot write %r back", wanted.tenant, wanted.version, state)
        return ""
