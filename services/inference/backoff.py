"""When what failed may be tried again."""

import time
from dataclasses import dataclass


@dataclass
class Backoff:
    """The pause doubles with each failure, up to `longest_s`."""

    pause_s: float
    longest_s: float = 3600.0
    _due: float = 0.0

    def failed(self) -> None:
        self._due = time.monotonic() + self.pause_s
        self.pause_s = min(2 * self.pause_s, self.longest_s)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._due
