"""Stage `register`: the export → a version of the tenant's registered model in MLflow, alias `challenger`.

    bit register digits

From here on a person decides: in MLflow's UI, or with `bit promote digits`.
"""

from training import receipt, tracking
from training.config import Config

STAGE = "register"


def main(config: Config, tenant: str) -> None:
    """Uploads the export, makes the version and writes the stage's receipt, which `fleet` reads."""
    packed, tuned = receipt.read("pack", tenant), receipt.read("finetune", tenant)
    judged, exported = receipt.read("evaluate", tenant), receipt.read("export", tenant)
    export = exported.outputs["export"]
    inputs = exported.inputs | {"export": export.sha256}
    out = receipt.folder(STAGE, tenant)
    metrics = judged.metrics | tuned.metrics | packed.metrics | exported.metrics
    tags = {
        "sha256": export.sha256,
        "size_bytes": str(export.size_bytes),
        "validation": "passed",  # export.py raises where ONNX Runtime and torch disagree
        "stage": STAGE,
        "accuracy": f"{judged.metrics['accuracy']:.4f}",
        "arch": str(exported.details["arch"]),
        "dvc.md5": packed.inputs["dvc.md5"],
    }
    with tracking.start(config.tracking_uri, STAGE, tenant, {}, inputs) as run:
        run.artifact(receipt.local(export), "export")
        run.metrics(metrics)
        version = run.register(tenant, "export", tags)
        receipt.Receipt(
            stage=STAGE,
            tenant=tenant,
            config_hash=receipt.hash_of(tenant),
            inputs=inputs,
            run_id=run.run_id,
            outputs={"export": export},
            metrics=metrics,
            details={"model": tenant, "version": version, "num_classes": exported.details["num_classes"]},
        ).write(out)
    print(f"{tenant}: version {version} registered (accuracy {judged.metrics['accuracy']:.1%}), alias challenger")
