"""When a client must have done what comes next."""

import asyncio
import math
from collections.abc import Callable


class Deadline:
    """A deadline that moves with every request. at: on the loop's clock, infinite where nothing is due; missed: called once.

    One timer runs on from request to request, and looks what is due when it rings: to set one and cancel it costs more.
    """

    __slots__ = ("_loop", "_missed", "_rings", "_timer", "at")

    def __init__(self, loop: asyncio.AbstractEventLoop, missed: Callable[[], None]) -> None:
        self._loop, self._missed = loop, missed
        self._timer: asyncio.TimerHandle | None = None
        self._rings = self.at = math.inf

    def set(self, seconds: float) -> None:
        """In so many seconds from now, whatever was due before."""
        self.at = self._loop.time() + seconds
        if self.at < self._rings:
            self._stop()
            self._start()

    def clear(self) -> None:
        self.at = math.inf

    def end(self) -> None:
        """No call any more."""
        self.at, self._missed = math.inf, _nothing
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self) -> None:
        self._timer, self._rings = self._loop.call_at(self.at, self._ring), self.at

    def _ring(self) -> None:
        self._timer, self._rings = None, math.inf
        if self.at == math.inf:
            return
        if self._loop.time() < self.at:
            self._start()
        else:
            self.at = math.inf
            self._missed()


def _nothing() -> None:
    pass
