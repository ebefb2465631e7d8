"""The access log: one JSON line per inference request on standard output, written by a thread of its own.

A reader that stalls (a full pipe) costs lines, counted and told, never a request.
"""

import queue
import sys
import threading
from typing import Any, BinaryIO

import orjson

MOST_WAITING = 200  # bundles of lines, ten seconds' worth
Line = dict[str, Any]


class AccessLog:
    def __init__(self, out: BinaryIO | None = None) -> None:
        self.out = out or sys.stdout.buffer
        self._bundles: queue.SimpleQueue[list[Line] | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, lines: list[Line]) -> None:
        if self._bundles.qsize() >= MOST_WAITING:
            self._dropped += len(lines)
        else:
            self._bundles.put(lines)

    def close(self) -> None:
        """Writes what waits; at most 2 seconds are spent on a reader that stalls."""
        self._bundles.put(None)
        self._thread.join(timeout=2)

    def _write(self) -> None:
        while (lines := self._bundles.get()) is not None:
            if self._dropped:
                lines[0]["dropped_lines"], self._dropped = self._dropped, 0
            self.out.write(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
            self.out.flush()
