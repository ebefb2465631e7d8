"""Small exports that answer by a rule that a test can foresee: the picture's mean brightness decides the class."""

import base64
import json
from itertools import pairwise

import cv2
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from services import preprocess

SIDE = 16
CLASSES = ["dark", "bright"]


WIDTH = 64
MFLOP_PER_CONVOLUTION = 2e-6 * SIDE * SIDE * WIDTH * WIDTH * 9
WIDEN = np.full((WIDTH, 3, 1, 1), 0.01, np.float32)
CONVOLUTION = np.full((WIDTH, WIDTH, 3, 3), 1e-3, np.float32)
NARROW = np.zeros((3, WIDTH, 1, 1), np.float32)


def _burden(count: int) -> list[onnx.NodeProto]:
    """Work that ends in nothing: 3 → 64 channels, `count` convolutions, back to 3 by a filter of zeros, added."""
    if not count:
        return []
    names = [f"burden-{n}" for n in range(count + 1)]
    middle = [helper.make_node("Conv", [a, "middle"], [b], pads=[1, 1, 1, 1]) for a, b in pairwise(names)]
    return [
        helper.make_node("Conv", ["centred", "in"], [names[0]]),
        *middle,
        helper.make_node("Conv", [names[-1], "out"], ["nothing"]),
        helper.make_node("Add", ["centred", "nothing"], ["feature_map"]),
    ]


def gray_png(value: int, side: int = 20) -> bytes:
    return cv2.imencode(".png", np.full((side, side, 3), value, np.uint8))[1].tobytes()


def export(
    sign: float = 1.0,
    golden_off: float = 0.0,
    classes: list[str] | None = None,
    threshold: float | None = None,
    mflop: float = 0,
) -> bytes:
    """An export in the contract's form. sign -1 turns every answer round; golden_off makes its golden answers wrong;
    mflop: floating-point operations per picture, in millions, spent on convolutions that change nothing.
    """
    head = np.array([[-sign, sign]] * 3, np.float32)
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["feature_map" if not mflop else "centred"]),
        *_burden(max(1, round(mflop / MFLOP_PER_CONVOLUTION)) if mflop else 0),
        helper.make_node("ReduceMean", ["feature_map"], ["features"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["features", "head_weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    shapes = {
        "probabilities": ["N", 2],
        "features": ["N", 3],
        "feature_map": ["N", 3, SIDE, SIDE],
        "head_weight": [3, 2],
    }
    constants = {"scale": np.float32(127.5), "one": np.float32(1), "head_weight": head}
    if mflop:
        constants |= {"in": WIDEN, "middle": CONVOLUTION, "out": NARROW}
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", SIDE, SIDE, 3])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = preprocess.pixels(gray_png(200), SIDE)[None]
    answer = session.run(["probabilities"], {"pixels": pixels})[0][0] + golden_off
    metadata = {
        "format": 1,
        "classes": classes or CLASSES,
        "multi_label": False,
        "resolution": SIDE,
        "resize": "squash",
        "threshold": threshold,
        "hyperrule": {},
        "metrics": {"accuracy": 1.0},
        "lineage": {"arch": "test", "dvc_md5": "none", "git_commit": "none", "run_id": "none"},
        "golden": [{"picture": base64.b64encode(gray_png(200)).decode(), "probabilities": answer.tolist()}],
    }
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.checker.check_model(proto)
    return proto.SerializeToString()
