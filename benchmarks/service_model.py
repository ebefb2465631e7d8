"""What one instance of the service can do, measured on a running one: the figures that benchmarks/autoscaling.py simulates with.

    python -m benchmarks.service_model       (about a minute; both cores should be free)

An R50x1 with random weights at 224 × 224 pixels, 1,000 classes (102 MB); pictures are JPEGs of 500 × 375 pixels.
"""

import argparse
import asyncio
import base64
import json
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import torch

from benchmarks import load
from services import preprocess
from tests.services.running import Folder, bit_serve
from training.models import graph, zoo
from training.models.archs import ARCHS


def photograph() -> bytes:
    """Smooth noise, as a JPEG of 500 × 375 pixels and about 40 kB."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", cv2.resize(small, (500, 375), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def export(arch: str, side: int, classes: int, seed: int) -> bytes:
    """An export in the contract's form."""
    torch.manual_seed(seed)
    model = zoo.create(arch, classes).eval()
    torch.nn.init.normal_(model.head.weight, std=0.01)
    proto = graph.build(model, side, multi_label=False)
    picture = photograph()
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    probabilities = session.run(["probabilities"], {"pixels": preprocess.pixels(picture, side)[None]})[0][0]
    metadata = {
        "format": 1,
        "classes": [f"class-{number}" for number in range(classes)],
        "multi_label": False,
        "resolution": side,
        "resize": "squash",
        "threshold": None,
        "hyperrule": {},
        "metrics": {},
        "lineage": {"arch": arch, "dvc_md5": "none", "git_commit": "none", "run_id": "none"},
        "golden": [{"picture": base64.b64encode(picture).decode(), "probabilities": probabilities.tolist()}],
    }
    graph.set_metadata(proto, metadata)
    return proto.SerializeToString()


def measure(arch: str, side: int, workers: int, seconds: float) -> dict[str, float]:
    """capacity: good answers per second with 16 connections that never pause; alone_ms: median of one at a time; start_s: process
    to ready; swap_s: new file to first new answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Folder(folder)
        store.publish("cats", export(arch, side, 1_000, seed=0))
        following = export(arch, side, 1_000, seed=1)
        ask = load.request("/v1/cats/classify?top=1", photograph())
        began = time.monotonic()
        with bit_serve(store, folder, "--workers", str(workers)) as service:
            start_s = time.monotonic() - began
            alone = asyncio.run(load.closed(service.url, ask, 1, seconds))
            busy = asyncio.run(load.closed(service.url, ask, 16, seconds))
            version = store.publish("cats", following)
            began = time.monotonic()
            while service.classify("cats", photograph(), "?top=1").json()["version"] != version:
                time.sleep(0.02)
            swap_s = time.monotonic() - began
    return {
        "workers": workers,
        "capacity": round(busy.rate, 1),
        "alone_ms": round(alone.percentile_ms(50), 1),
        "start_s": round(start_s, 1),
        "swap_s": round(swap_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="R50x1", choices=list(ARCHS))
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--workers", type=int, default=1, help="what the chart gives a pod: a worker per whole core")
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.arch, arguments.side, arguments.workers, arguments.seconds)))


if __name__ == "__main__":
    main()
