"""Two ranks that restore a checkpoint that only rank 0 can read, whole and sharded; for test_distributed.py."""

import sys

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from training.engine.checkpoint import Checkpoints
from training.engine.distributed import World, join
from training.engine.store import Store


def network(value: float, sharded: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A linear layer of `value` and its optimizer after one step with a gradient of ones."""
    model = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.constant_(model.weight, value)
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer


def means(world: World, store: Store, fork: bool, sharded: bool) -> list[float]:
    """Of weight and momentum after a restore."""
    model, optimizer = network(9.0 + world.rank, sharded)
    Checkpoints(store, {"lr": "0.2" if fork else "0.1"}, fork=fork).restore(model, optimizer, world)
    tensors = [model.weight, optimizer.state[model.weight]["momentum_buffer"]]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).mean().item() for t in tensors]


def main(folder: str) -> None:
    with join(20) as world:
        store = Store(f"{folder}/{world.rank}")
        for sharded in (False, True):
            checkpoints = Checkpoints(store, {"lr": "0.1"})
            checkpoints.save(3, *network(4.0, sharded), world)
            checkpoints.wait()
            for fork in (False, True):
                print(f"sharded {sharded} fork {fork} {means(world, store, fork, sharded)}", flush=True)
        assert store.folders() == (["step-00000003"] if world.is_main else [])


if __name__ == "__main__":
    main(sys.argv[1])
