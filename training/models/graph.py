"""A BiT network as an ONNX graph, in the form that ONNX Runtime runs fastest in exact fp32.

Filters are standardised once, here. GroupNorm becomes Reshape → LayerNormalization → depthwise 1×1 convolution (1.06 to
1.12 times the decomposed form). Everything that serving needs is inside: pixels are normalised and logits turned into
probabilities by the graph. Size is fixed by `resolution`, the number of pictures is free.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from training.models.resnet import Bottleneck, GroupNormReLU, ResNet, StdConv2d, units_of

OPSET = 17  # the first with LayerNormalization
IR_VERSION = 8


class Graph:
    """Nodes and initializers as they are added. Methods take and return the names of tensors."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, name: str, array: NDArray[Any]) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def conv(self, x: str, name: str, layer: StdConv2d) -> str:
        weight = self.constant(f"{name}.weight", layer.standardized().detach().cpu().float().numpy())
        pad = int(layer.padding[0])
        return self.add("Conv", x, weight, strides=list(layer.stride), pads=[pad] * 4)

    def norm_relu(self, x: str, name: str, norm: GroupNormReLU, side: int, output: str | None = None) -> str:
        """x: [N, C, side, side]."""
        channels, groups = norm.num_channels, norm.num_groups
        size = channels // groups * side * side
        grouped = self.add("Reshape", x, self.constant(f"groups_{groups}", np.array([0, groups, -1])))
        scale = self.constant(f"ones_{size}", np.ones(size, np.float32))
        grouped = self.add("LayerNormalization", grouped, scale, axis=-1, epsilon=norm.eps)
        shape = self.constant(f"shape_{channels}_{side}", np.array([0, channels, side, side]))
        gamma = self.constant(f"{name}.gamma", norm.weight.detach().cpu().float().numpy().reshape(-1, 1, 1, 1))
        beta = self.constant(f"{name}.beta", norm.bias.detach().cpu().float().numpy())
        x = self.add("Conv", self.add("Reshape", grouped, shape), gamma, beta, group=channels)
        return self.add("Relu", x, output=output)

    def unit(self, x: str, name: str, unit: Bottleneck, side: int) -> tuple[str, int]:
        """One bottleneck; returns the output and its side."""
        active = self.norm_relu(x, f"{name}.norm1", unit.norm1, side)
        shortcut = x if unit.downsample is None else self.conv(active, f"{name}.downsample", unit.downsample)
        y = self.conv(active, f"{name}.conv1", unit.conv1)
        y = self.conv(self.norm_relu(y, f"{name}.norm2", unit.norm2, side), f"{name}.conv2", unit.conv2)
        side = -(-side // int(unit.conv2.stride[0]))
        y = self.conv(self.norm_relu(y, f"{name}.norm3", unit.norm3, side), f"{name}.conv3", unit.conv3)
        return self.add("Add", y, shortcut), side


def set_metadata(proto: onnx.ModelProto, values: Mapping[str, Any]) -> None:
    """Stores every value as JSON in the file's metadata_props."""
    helper.set_model_props(proto, {key: json.dumps(value, sort_keys=True) for key, value in values.items()})


def build(model: ResNet, resolution: int, multi_label: bool) -> onnx.ModelProto:
    """The whole network, from pixels to probabilities.

    Input `pixels` uint8 [N, S, S, 3]. Outputs `probabilities` [N, C], `features` [N, D], `feature_map` [N, D, s, s],
    `head_weight` [D, C], all float32; whatever is not fetched of the last three costs nothing.
    """
    graph = Graph()
    x = graph.add("Cast", graph.add("Transpose", "pixels", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    x = graph.add("Div", x, graph.constant("half_range", np.array(127.5, np.float32)))
    x = graph.add("Sub", x, graph.constant("one", np.array(1.0, np.float32)))
    x = graph.conv(x, "stem", model.stem)
    side = -(-resolution // 2)
    # Pad, then pool without padding: the authors pad with zeros, MaxPool's own padding would be -inf.
    x = graph.add("Pad", x, graph.constant("pool_padding", np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    x = graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    side = -(-side // 2)
    for b, block in enumerate(model.blocks, 1):
        for u, unit in enumerate(units_of(block), 1):
            x, side = graph.unit(x, f"block{b}.unit{u:02d}", unit, side)
    graph.norm_relu(x, "norm", model.norm, side, output="feature_map")
    graph.add("ReduceMean", "feature_map", output="features", axes=[2, 3], keepdims=0)
    head = model.head.weight.detach().cpu().float().numpy()
    graph.constant("head_weight", head.T)
    bias = graph.constant("head_bias", model.head.bias.detach().cpu().float().numpy())
    logits = graph.add("Add", graph.add("MatMul", "features", "head_weight"), bias)
    if multi_label:
        graph.add("Sigmoid", logits, output="probabilities")
    else:
        graph.add("Softmax", logits, output="probabilities", axis=1)

    classes, depth = head.shape
    outputs = {
        "probabilities": ["N", classes],
        "features": ["N", depth],
        "feature_map": ["N", depth, side, side],
        "head_weight": [depth, classes],
    }
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "bit",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", resolution, resolution, 3])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            list(graph.initializers.values()),
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="bit",
    )
