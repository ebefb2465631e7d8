"""The most that this machine can do with an export, without any HTTP: one thread per core decodes a picture and runs the network.

A process of its own, as the service is one, that waits between two measurements: they may then be as short and as many as it
takes on a machine whose speed changes from second to second.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from services import preprocess
from services.inference.engine import Session


class Limit:
    """The process, asked line by line; it runs inside a `with`.

    Raises RuntimeError where it ended by itself; why stands on stderr.
    """

    def __init__(self, export: Path, picture: Path) -> None:
        self.command = [sys.executable, "-m", "benchmarks.limit", str(export), str(picture)]

    def __enter__(self) -> Self:
        self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.communicate()  # the end of its input ends it

    def alone(self, seconds: float) -> dict[str, float]:
        """{"p50_ms": what a picture takes while one thread works}."""
        return self._ask("alone", seconds)

    def together(self, seconds: float) -> dict[str, float]:
        """{"rate": pictures per second of all threads, "cpu_s": processor time of a picture}."""
        return self._ask("together", seconds)

    def _ask(self, what: str, seconds: float) -> dict[str, float]:
        assert self.child.stdin
        assert self.child.stdout
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write(f"{what} {seconds}\n")
            self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"the limit's process ended with status {self.child.wait()}: {' '.join(self.command)}")
        return json.loads(line)


class Worker:
    """What the process does: as the service's threads, without the service."""

    def __init__(self, data: bytes, picture: bytes) -> None:
        self.session, self.picture = Session(data), picture
        self.size = self.session.card.resolution
        for _ in range(10):
            self.answer()

    def answer(self) -> None:
        self.session.run(preprocess.pixels(self.picture, self.size)[None])

    def alone(self, seconds: float) -> dict[str, float]:
        took, end = [], time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            self.answer()
            took.append(time.perf_counter() - began)
        return {"p50_ms": statistics.median(took) * 1000}

    def together(self, seconds: float) -> dict[str, float]:
        counts = [0] * (os.cpu_count() or 1)
        began, used_s = time.perf_counter(), time.process_time()
        end = began + seconds

        def work(number: int) -> None:
            while time.perf_counter() < end:
                self.answer()
                counts[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(counts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took_s, used_s = time.perf_counter() - began, time.process_time() - used_s
        return {"rate": sum(counts) / took_s, "cpu_s": used_s / sum(counts)}


def main() -> None:
    worker = Worker(Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]).read_bytes())
    measures = {"alone": worker.alone, "together": worker.together}
    for line in sys.stdin:
        what, seconds = line.split()
        print(json.dumps(measures[what](float(seconds))), flush=True)


if __name__ == "__main__":
    main()
