"""Stage `fleet`: every tenant's registered version in one table and one plot.

bit fleet
"""

import csv
from pathlib import Path

from training import plots, receipt
from training.config import Config

STAGE = "fleet"


def main(config: Config) -> None:
    """Writes runs/fleet: fleet.csv, fleet.md, accuracy.png and metrics.json. The table says all; no MLflow run is made."""
    out = receipt.folder(STAGE)
    out.mkdir(parents=True, exist_ok=True)
    found = sorted(Path("runs", "register").glob(f"*/{receipt.FILE}"))
    receipts = [receipt.Receipt.model_validate_json(path.read_text()) for path in found]
    rows = [row(made) for made in receipts]
    if rows:
        with (out / "fleet.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (out / "fleet.md").write_text(markdown(rows))
    series: dict[str, list[float | None]] = {
        "by transfer": [made.metrics["accuracy"] for made in receipts],
        "from scratch": [made.metrics.get("scratch_accuracy") for made in receipts],
    }
    plots.accuracy_bars([str(made.tenant) for made in receipts], series, out / "accuracy.png")
    receipt.Receipt(
        stage=STAGE,
        tenant=None,
        config_hash="",
        inputs={str(made.tenant): made.outputs["export"].sha256 for made in receipts},
        run_id="",
        metrics={f"{made.tenant}_accuracy": made.metrics["accuracy"] for made in receipts},
    ).write(out)


def row(made: receipt.Receipt) -> dict[str, str]:
    """One line of the table; an empty cell where a comparison with scratch was not asked for."""
    metrics = made.metrics

    def percent(name: str) -> str:
        return f"{metrics[name]:.1%}" if name in metrics else ""

    return {
        "tenant": str(made.tenant),
        "classes": str(made.details["num_classes"]),
        "train": f"{metrics['train_examples']:.0f}",
        "test": f"{metrics['test_examples']:.0f}",
        "from scratch": percent("scratch_accuracy"),
        "by transfer": percent("accuracy"),
        "seconds": f"{metrics['transfer_seconds']:.1f}",
        "version": str(made.details["version"]),
    }


def markdown(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "No tenant has a registered version yet.\n"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(r.values()) for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
