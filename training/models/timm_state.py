"""timm's state dicts of the same networks (`resnetv2_50x1_bit` and its kin), read and written. timm itself is not needed."""

import re
from collections.abc import Mapping

import torch

from training.models.npz import WeightsError
from training.models.resnet import ResNet

HEAD_WEIGHT = "head.fc.weight"  # timm keeps the head as a 1×1 convolution


def dump(model: ResNet) -> dict[str, torch.Tensor]:
    """The network's parameters under timm's names and in timm's shapes."""
    state = {to_timm(name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state[HEAD_WEIGHT] = state[HEAD_WEIGHT][..., None, None]
    return state


def load(model: ResNet, state: Mapping[str, torch.Tensor], head: bool = True) -> ResNet:
    """Fills `model` from a timm state dict; `head=False` leaves its own head as it is. Raises WeightsError."""
    ours = model.state_dict()
    names = {to_timm(name): name for name in ours}
    if unknown := sorted(set(state) - set(names)):
        raise WeightsError(f"the state dict holds {unknown[0]}, which the network does not have. Is `arch` its own?")
    with torch.no_grad():
        for key, name in names.items():
            if not head and name.startswith("head."):
                continue
            parameter = ours[name]
            if key not in state:
                raise WeightsError(f"the state dict has no {key}. Is `arch` the network's own?")
            tensor = state[key]
            if key == HEAD_WEIGHT:
                tensor = tensor.flatten(1)
            if tensor.shape != parameter.shape:
                raise WeightsError(f"{key} is {tuple(tensor.shape)}, the network wants {tuple(parameter.shape)}.")
            if not torch.isfinite(tensor).all():
                raise WeightsError(f"{key} holds NaN or infinity; every value must be finite.")
            parameter.copy_(tensor)
    return model


def num_classes(state: Mapping[str, torch.Tensor]) -> int:
    """Outputs of the head of a timm state dict."""
    if HEAD_WEIGHT not in state:
        raise WeightsError(f"the state dict has no {HEAD_WEIGHT}: its head was dropped. Give the number of classes.")
    return int(state[HEAD_WEIGHT].shape[0])


def to_timm(name: str) -> str:
    """One of our parameters' names → timm's."""
    name = re.sub(r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)
    name = name.replace("downsample.weight", "downsample.conv.weight")
    return re.sub(r"^head\.", "head.fc.", re.sub(r"^stem\.", "stem.conv.", name))
