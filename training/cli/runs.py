"""`bit runs`: the trainings of this project, those that run and those that have ended."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from training import receipt


def runs() -> None:
    """Trainings of this project: which run, which were stopped or died and can go on, which are done."""
    from training.engine import attempts, store  # torch comes with them

    table = Table("training", "state", "step", "attempts", "failures", "hours", "since (UTC)", "MLflow run")
    place = store.everything()
    for file in place.files(attempts.FILE):
        name = file.rpartition("/")[0]
        record = attempts.read(place.child(name))
        if record is None:
            continue
        state: str = record.state
        if state == "running" and not record.is_alive:
            state = f"running on {record.host}" if record.is_elsewhere else "died; the next start goes on"
        step = f"{record.step}/{record.steps}" if record.steps else "0"
        counts = (str(record.attempts), str(record.failures), f"{record.seconds / 3600:.2f}")
        table.add_row(name, state, step, *counts, record.since[:16].replace("T", " "), (record.run_id or "")[:12])
    for path in sorted(Path("runs").glob("**/receipt.json")):
        if path.parts[1] in ("pretrain", "finetune"):
            made = receipt.Receipt.model_validate_json(path.read_text())
            table.add_row(made.tenant or "upstream", "done", "", "", "", "", "", made.run_id[:12])
    Console().print(
        table if table.row_count else "No training yet: `bit pretrain` or `bit finetune TENANT` begins one."
    )
