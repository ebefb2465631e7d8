"""`bit demo seeds`: accuracy by transfer and from scratch over several seeds, outside the pipeline and without MLflow.

Each seed draws another head, another order of the pictures and other crops; the few training pictures stay the same.
"""

import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from training import finetune, receipt
from training.config import Config
from training.data.dataset import Dataset
from training.engine import distributed, memory
from training.engine.fit import View, fit
from training.models import npz, zoo
from training.params import load, tenants


def main(config: Config, count: int) -> None:
    """Needs the packed data and the upstream network of a finished `dvc repro`; prints one row per tenant."""
    upstream = receipt.read("pretrain")
    table = Table("tenant", f"from scratch, median of {count} seeds", "by transfer", "gain")
    with distributed.join() as world:
        for tenant in tenants():
            figures = {
                start: [accuracy(tenant, start, seed, upstream, world) for seed in range(count)]
                for start in (finetune.SCRATCH, finetune.TRANSFER)
            }
            scratch, transfer = figures[finetune.SCRATCH], figures[finetune.TRANSFER]
            gain = statistics.median(transfer) - statistics.median(scratch)
            table.add_row(tenant, spread(scratch), spread(transfer), f"{gain * 100:+.1f} points")
    Console().print(table)


def accuracy(tenant: str, start: str, seed: int, upstream: receipt.Receipt, world: distributed.World) -> float:
    """Test accuracy of one training by the tenant's HyperRule."""
    config = load(tenant=tenant, overrides=[f"finetune.seed={seed}"])
    data = Dataset.open(receipt.read("pack", tenant).outputs["dataset"].uri)
    rule = finetune.rule_for(config.finetune, data)
    torch.manual_seed(seed)
    model = zoo.create(str(upstream.details["arch"]), data.num_classes)
    if start == finetune.TRANSFER:
        npz.load(model, upstream.outputs["weights"].uri, head=False)
    recipe = finetune.recipe_for(config.finetune, rule, data.multi_label)
    history = fit(
        model,
        memory.prepare(model, recipe, config.finetune, rule.crop, world),
        data,
        View(rule.resize, rule.crop, config.finetune.flips, config.finetune.crops),
        world,
        name=f"seeds-{tenant}-{start}",
        decides=config.finetune.decisive() | {"data": data.fingerprint, "upstream": upstream.outputs["weights"].sha256},
        record=lambda figures, step: None,
    )
    reached = history["test_accuracy"][-1][1]
    print(f"{tenant} {start} seed {seed}: {reached:.1%}", file=sys.stderr)
    return reached


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1%} ({min(values):.1%} to {max(values):.1%})"
