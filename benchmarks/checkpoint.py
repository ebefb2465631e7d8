"""What checkpoints cost training: how long one holds the steps up, how much work writing is, the share of both at an interval.

    python -m benchmarks.checkpoint          (2 minutes on 2 cores; --arch R50x1 --classes 21843 --interval_s 300)

Steps of the network, with a checkpoint in the middle of every other round, into a local folder (--url: any other). held_up: the
copy, during which no step runs; written: from then until it is complete, while steps go on; processor: seconds of work, copy and
writing. The share at an interval counts held_up and all of that work, as if every core were wanted by the steps.
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F

from benchmarks import machine
from training.engine.checkpoint import Checkpoints
from training.engine.distributed import World
from training.engine.store import Store
from training.models import fused, zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="R50x1", choices=list(zoo.ARCHS))
    parser.add_argument("--classes", type=int, default=21_843)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval_s", type=float, default=300)
    parser.add_argument("--url", help="where checkpoints go; default: a temporary folder")
    arguments = parser.parse_args()
    described = machine.describe("torch")
    model, world = zoo.create(arguments.arch, arguments.classes), World(0, 1, torch.device("cpu"))
    fused.fuse(model, world.device)
    optimizer = world.backend.optimizer(model.parameters(), 0.01, 0.9, 1e-4, whole=True)
    images = torch.randn(arguments.batch, 3, arguments.side, arguments.side).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, arguments.classes, (arguments.batch,))
    held_up, written, work, plain = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Store(arguments.url or folder), {})
        for number in range(2 * arguments.rounds + 1):  # the first warms up
            busy = time.process_time()
            for step in range(arguments.steps):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                if number % 2 and step == 0:
                    began = time.perf_counter()
                    checkpoints.save(number, model, optimizer, world)
                    held_up.append(time.perf_counter() - began)
            checkpoints.wait()
            busy = time.process_time() - busy
            if number % 2:
                written.append(time.perf_counter() - began)
                work.append(busy)
            elif number:
                plain.append(busy)
        checkpoints.clear()
    extra = max(0.0, statistics.median(with_one - without for with_one, without in zip(work, plain, strict=True)))
    held = statistics.median(held_up)
    cores = described["cores"]
    figures = {
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "state_mb": round(8 * sum(parameter.numel() for parameter in model.parameters()) / 1e6),
        "held_up_s": round(held, 3),
        "written_s": round(statistics.median(written), 3),
        "processor_s": round(extra, 3),
        "share_at_interval": round((held + extra / cores) / arguments.interval_s, 5),
    }
    print(figures)
    machine.write("checkpoint", described, figures)


if __name__ == "__main__":
    main()
