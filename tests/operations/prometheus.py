"""A real Prometheus (Debian's package) that scrapes what a test names."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from training.demo.walk import free_port
from training.serve import process, wait_for

Sample = tuple[dict[str, str], float]


class Prometheus:
    """url: where it listens on 127.0.0.1."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, query: str) -> list[Sample]:
        """The instant query's series, now. Raises AssertionError with Prometheus' own words where it refuses the query."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10).json()
        assert answer["status"] == "success", f"{query}: {answer.get('error')}"
        return [(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]

    def wait(self, query: str, until: Callable[[list[Sample]], bool], seconds: float) -> float:
        """Seconds until the query's answer is as wanted. Raises AssertionError with the last answer."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if until(found := self.ask(query)):
                return time.monotonic() - began
            time.sleep(0.25)
        raise AssertionError(f"{query} is {found} after {seconds} s")


@contextmanager
def prometheus(
    folder: Path, scrapes: list[dict[str, Any]], rules: Path | None = None, interval: str = "1s"
) -> Iterator[Prometheus]:
    """Runs until the block ends. scrapes: entries of scrape_configs; interval: of scrapes that set none, and of rules."""
    config = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "scrape_configs": scrapes,
        "rule_files": [str(rules)] if rules else [],
    }
    path, port = folder / "prometheus.yaml", free_port()
    path.write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with process("prometheus", command, folder / "prometheus.log"):
        wait_for(f"http://127.0.0.1:{port}/-/ready", 30, folder / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
