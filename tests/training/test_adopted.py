"""The network that fine-tuning starts from."""

from pathlib import Path

import torch

from training import finetune, receipt
from training.models import npz, zoo


def test_it_is_the_upstream_one_with_a_head_of_zeros_for_every_tenant(tmp_path: Path) -> None:
    torch.manual_seed(1)
    upstream = zoo.create("R14x0.5", 7)
    torch.nn.init.normal_(upstream.head.weight)
    npz.save(upstream, tmp_path / "up.npz")
    sha256 = receipt.artifact(tmp_path / "up.npz").sha256
    first = finetune.adopted("R14x0.5", 3, tmp_path / "up.npz", sha256)
    wanted = npz.load(zoo.create("R14x0.5", 3), tmp_path / "up.npz", head=False)
    with torch.no_grad():
        first.stem.weight.add_(1.0)  # a tenant's training stays its own
    second = finetune.adopted("R14x0.5", 3, tmp_path / "up.npz", sha256)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert second.stem.weight.stride() == wanted.stem.weight.stride()
    assert not second.head.weight.any()
    assert not second.head.bias.any()
