"""Which thread goes first: answering before computing, computing before loading; of idle workers the one that worked last."""

import os
import threading


def give_way(niceness: int) -> None:
    """Makes this thread at least so nice. One that is nicer already (a service under `nice`) stays so: only root may go back."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


class Idle:
    """Workers that wait for work under `lock`. The last to come is the first to go: its core still holds what it needs.

    threading.Condition wakes the one that waited longest, which with little to do is always the one on the coldest core.
    """

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._gates: list[threading.Lock] = []

    def wait(self) -> None:
        """Gives the lock up until woken; by then somebody else may have taken the work."""
        gate = threading.Lock()
        gate.acquire()
        self._gates.append(gate)
        self._lock.release()
        try:
            gate.acquire()
        finally:
            self._lock.acquire()

    def wake(self) -> None:
        """One of them, where there is one; the caller holds the lock."""
        if self._gates:
            self._gates.pop().release()

    def wake_all(self) -> None:
        while self._gates:
            self.wake()
