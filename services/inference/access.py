"""The access log: one JSON line per inference request on standard output, written by a thread of its own.

A reader that stalls (a full pipe) costs lines, counted and told, never a request.
"""

import queue
import sys
import threading
from typing import Any, BinaryIO

import orjson

MOST_WAITING = 20_000  # lines
TOGETHER_S = 0.05


class AccessLog:
    def __init__(self, out: BinaryIO | None = None) -> None:
        self.out = out or sys.stdout.buffer
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._dropped, self._closing = 0, threading.Event()
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, **fields: Any) -> None:
        if self._lines.qsize() >= MOST_WAITING:
            self._dropped += 1
            return
        self._lines.put(fields)

    def close(self) -> None:
        """Writes what waits; at most 2 seconds are spent on a reader that stalls."""
        self._closing.set()
        self._lines.put(None)
        self._thread.join(timeout=2)

    def _write(self) -> None:
        """Lines are written together: a thread that woke for each would fight the event loop for the interpreter."""
        while (fields := self._lines.get()) is not None:
            self._closing.wait(TOGETHER_S)
            lines = [fields]
            while not self._lines.empty() and (more := self._lines.get()) is not None:
                lines.append(more)
            if self._dropped:
                fields["dropped_lines"], self._dropped = self._dropped, 0
            self.out.write(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
            self.out.flush()
            if self._closing.is_set() and self._lines.empty():
                return
