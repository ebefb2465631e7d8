"""The access log: one JSON line per inference request on standard output, written by a thread of its own.

A reader that stalls (a full pipe) costs lines, counted and told, never a request.
"""

import queue
import sys
import threading
from typing import Any, BinaryIO

import orjson

MOST_WAITING = 20_000  # lines


class AccessLog:
    def __init__(self, out: BinaryIO | None = None) -> None:
        self.out = out or sys.stdout.buffer
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, **fields: Any) -> None:
        if self._lines.qsize() >= MOST_WAITING:
            self._dropped += 1
            return
        self._lines.put(fields)

    def close(self) -> None:
        """Writes what waits; at most 2 seconds are spent on a reader that stalls."""
        self._lines.put(None)
        self._thread.join(timeout=2)

    def _write(self) -> None:
        while True:
            fields = self._lines.get()
            if fields is None:
                return
            if self._dropped:
                fields["dropped_lines"], self._dropped = self._dropped, 0
            self.out.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))
            if self._lines.empty():
                self.out.flush()
