"""Stage `export`: a tenant's weights → the one .onnx that is served, with everything that serving needs inside.

    bit export digits

The file is checked before it counts: ONNX Runtime's answers on test pictures must be torch's, within `export.tolerance`.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from services import preprocess
from training import lineage, receipt, tracking
from training.config import Config
from training.data.dataset import Dataset, Split
from training.errors import UserError
from training.models import graph, npz, zoo
from training.models.resnet import ResNet, normalize

STAGE = "export"
FORMAT = 1
CHECKED = 64  # test pictures that ONNX Runtime and torch must agree on


class ParityError(UserError):
    """ONNX Runtime and torch disagree on the same pictures: the export must not be served."""


def main(config: Config, tenant: str) -> None:
    """Builds, checks and writes the export of one tenant and the stage's receipt."""
    packed, tuned = receipt.read("pack", tenant), receipt.read("finetune", tenant)
    judged = receipt.read("evaluate", tenant)
    data = Dataset.open(packed.outputs["dataset"].uri)
    arch, rule = str(tuned.details["arch"]), dict(tuned.details["hyperrule"])
    weights = tuned.outputs["transfer"]
    model = npz.load(zoo.create(arch, data.num_classes), receipt.local(weights)).eval()
    split, resolution = data.split(str(judged.details["split"])), int(rule["crop"])
    out = receipt.folder(STAGE, tenant)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.onnx"

    inputs = tuned.inputs | {"weights": weights.sha256}
    params = {STAGE: config.export.model_dump()}
    with tracking.start(config.tracking_uri, STAGE, tenant, params, inputs) as run:
        metadata: dict[str, Any] = {
            "format": FORMAT,
            "classes": data.classes,
            "multi_label": data.multi_label,
            "resolution": resolution,
            "resize": "squash",
            "threshold": config.export.threshold,
            "hyperrule": rule | {"deviations": tuned.details["deviations"]},
            "metrics": judged.metrics,
            "lineage": {
                "tenant": tenant,
                "arch": arch,
                "data": data.fingerprint,
                "dvc_md5": packed.inputs["dvc.md5"],
                "git_commit": lineage.git_commit(),
                "run_id": tuned.run_id,
                "upstream": weights_of_upstream(tuned),
            },
        }
        proto = graph.build(model, resolution, data.multi_label)
        session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        difference = parity(session, model, split, resolution, data.multi_label)
        if difference > config.export.tolerance:
            raise ParityError(
                f"ONNX Runtime and torch differ by {difference:.2g} on test pictures, export.tolerance is "
                f"{config.export.tolerance:g}. Raise it only if you know where the difference comes from."
            )
        golden = golden_pictures(session, split, resolution, config.export.golden)
        graph.set_metadata(proto, metadata | {"golden": golden})
        onnx.checker.check_model(proto)
        write(proto, path)
        metrics = {"max_difference": difference}
        run.metrics(metrics)
        receipt.Receipt(
            stage=STAGE,
            tenant=tenant,
            config_hash=receipt.hash_of(config.export),
            inputs=inputs,
            run_id=run.run_id,
            outputs={"export": receipt.artifact(path)},
            metrics=metrics,
            details={"arch": arch, "resolution": resolution, "num_classes": data.num_classes},
        ).write(out)


def parity(session: ort.InferenceSession, model: ResNet, split: Split, size: int, multi_label: bool) -> float:
    """Largest difference of probabilities between ONNX Runtime and torch, over up to 64 pictures of the split."""
    chosen = np.linspace(0, len(split) - 1, min(CHECKED, len(split))).astype(int)
    images = np.stack([preprocess.pixels(split.read(int(i)), size) for i in chosen])
    with torch.inference_mode():
        logits = model(normalize(torch.from_numpy(images)))
        expected = torch.sigmoid(logits) if multi_label else torch.softmax(logits, 1)
    return float(np.abs(answer(session, images) - expected.numpy()).max())


def golden_pictures(session: ort.InferenceSession, split: Split, size: int, count: int) -> list[dict[str, Any]]:
    """Pictures of the split, spread over it, as files (base64) with the export's answers to them."""
    chosen = np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)
    pictures = [split.read(int(i)) for i in chosen]
    answers = answer(session, np.stack([preprocess.pixels(picture, size) for picture in pictures]))
    return [
        {"picture": base64.b64encode(picture).decode(), "probabilities": [float(p) for p in row]}
        for picture, row in zip(pictures, answers, strict=True)
    ]


def answer(session: ort.InferenceSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, S, S, 3] → probabilities [N, C]."""
    return session.run(["probabilities"], {"pixels": images})[0]


def weights_of_upstream(tuned: receipt.Receipt) -> dict[str, str]:
    return {"sha256": tuned.inputs["upstream"], "version": str(tuned.details["upstream_version"])}


def write(proto: onnx.ModelProto, path: Path) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(proto.SerializeToString(deterministic=True))
    temporary.rename(path)
