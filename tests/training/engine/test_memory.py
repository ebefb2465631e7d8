"""What may be set about memory, and that it changes no result."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.training.engine.small_training import recipe
from training.config import PretrainConfig
from training.engine import inference, memory
from training.engine.distributed import World
from training.engine.recipe import BatchError
from training.models import zoo

CPU = World(rank=0, size=1, device=torch.device("cpu"))


def test_auto_takes_the_whole_share_where_memory_is_plenty() -> None:
    model = zoo.create("R14x0.5", 4)
    stage = PretrainConfig(micro_batch="auto")
    assert memory.prepare(model, recipe(1), stage, 32, CPU).micro_batch == 16


@pytest.mark.parametrize(("room", "expected"), [(16, 16), (15, 8), (5, 4), (3, 2), (0, 2)])
def test_auto_takes_the_largest_even_divisor_that_fits(room: int, expected: int) -> None:
    model = zoo.create("R14x0.5", 4)
    each = memory.picture_bytes(model, 32, bf16=False)
    free = (room + 0.01) * each / memory.SHARE
    assert memory.find(model, recipe(1), 32, CPU, free) == expected


def test_an_odd_share_cannot_be_mixed_up() -> None:
    with pytest.raises(BatchError, match="global_batch=15 is odd"):
        memory.find(zoo.create("R14x0.5", 4), replace(recipe(1), global_batch=15), 32, CPU)


def test_what_a_picture_keeps_grows_with_its_area_and_shrinks_by_recomputing() -> None:
    model = zoo.create("R14x0.5", 4)
    small, large = memory.picture_bytes(model, 32, bf16=False), memory.picture_bytes(model, 64, bf16=False)
    assert 3.5 < large / small < 4.5
    model.recompute = True
    assert memory.picture_bytes(model, 64, bf16=False) < 0.5 * large


@pytest.mark.parametrize("fused", [False, True])
def test_activation_checkpointing_changes_no_gradient(fused: bool) -> None:
    torch.manual_seed(0)
    model, images = zoo.create("R14x0.5", 4), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(model.head.weight)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    memory.prepare(model, recipe(1), PretrainConfig(fused=fused), 32, CPU)
    plain = gradients()
    memory.prepare(model, recipe(1), PretrainConfig(fused=fused, activation_checkpointing=True), 32, CPU)
    assert model.recompute
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_an_evaluation_that_does_not_fit_goes_on_in_halves() -> None:
    torch.manual_seed(0)
    model, pixels = zoo.create("R14x0.5", 4), torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8)
    torch.nn.init.normal_(model.head.weight)
    sizes = []

    def limit(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no room")

    with torch.inference_mode():
        whole = inference.logits_of(model, pixels)
        model.register_forward_pre_hook(limit)
        parts = inference.logits_of(model, pixels)
    torch.testing.assert_close(parts, whole)
    assert [size for size in sizes if size <= 2] == [2, 2, 2, 1]


CHILD = """
import resource, sys, torch
from training.engine.backends import Backend
if sys.argv[1] == "kept":
    Backend(torch.device("cpu"))
for step in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 64, 96, 96)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


def test_memory_of_one_step_serves_the_next() -> None:
    """Where it goes back to the system, every step asks for new pages: 37 MB are 9,200 of them."""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", CHILD, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("kept") < faults("given back") / 4  # which are fewer where the system's pages are huge


KEPT = """
import os, torch
from pathlib import Path
from training.engine.backends import Backend
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
backend = Backend(torch.device("cpu"))
held = torch.ones(256, 1024, 1024)
with_it = resident()
del held
kept = resident()
backend.give_back()
print(with_it, kept, resident())
"""


def test_what_is_kept_can_be_given_back() -> None:
    """Or the next of several trainings in one process would find little memory, and take small micro-batches."""
    done = subprocess.run([sys.executable, "-c", KEPT], check=True, capture_output=True, text=True)
    with_it, kept, after = map(int, done.stdout.split())
    assert kept > 0.9 * with_it
    assert with_it - after > 900
