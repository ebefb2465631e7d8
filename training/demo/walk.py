"""`make demo`: the whole way, from pictures to answers over HTTP, and a table of what came out."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from training import fleet, promote, receipt, serve
from training.config import Config
from training.demo import data
from training.params import tenants


def main(config: Config) -> None:
    """Makes what is missing, reruns what changed, promotes, serves, classifies one test picture of each tenant."""
    began = time.monotonic()
    if not data.is_there(Path()):
        data.write(Path())
        data.track(Path())
    _say("dvc repro: every stage whose inputs changed")
    subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True)

    names = tenants()
    for tenant in names:
        _say("\n".join(promote.main(config, tenant, why="make demo")))

    answers, rows = [], []
    with serve.running(config.tracking_uri, free_port(), free_port()) as (service, _):
        for tenant in names:
            picture = next(iter(sorted(Path("tenants", tenant, "pictures", "test").glob("*/*.png"))))
            answer, probability, version, latency = classify(service, tenant, picture)
            shown = "/".join(picture.parts[-2:])
            answers.append(f"POST /v1/{tenant}/classify < {shown} → {answer} ({probability}), version {version}")
            rows.append(fleet.row(receipt.read("register", tenant)) | {"latency": latency})

    width = None if sys.stdout.isatty() else 110  # a log has no width of its own
    console = Console(width=width)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*row.values())
    console.print(table, *answers, sep="\n")
    console.print(
        f"Done in {time.monotonic() - began:.0f} s. Next:\n"
        "  make serve                      the playground, and MLflow's UI to promote in\n"
        "  open runs/evaluate/digits       confusion matrix and the worst mistakes\n"
        "  bit pack --help                 your own pictures: see the README",
        highlight=False,
    )


def classify(service: str, tenant: str, picture: Path) -> tuple[str, str, str, str]:
    """One test picture over HTTP: (answer, probability, version, latency as the median of 20 requests)."""
    body, took = picture.read_bytes(), []
    with httpx.Client(base_url=service, timeout=30) as http:
        for _ in range(20):
            began = time.perf_counter()
            response = http.post(f"/v1/{tenant}/classify?top=1", content=body)
            took.append(time.perf_counter() - began)
            response.raise_for_status()
    told = response.json()
    best = told["predictions"][0]
    latency = f"{sorted(took)[len(took) // 2] * 1000:.1f} ms"
    return best["class"], f"{best['probability']:.1%}", told["version"], latency


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
