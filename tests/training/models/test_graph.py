"""The ONNX graph answers what torch answers, and its outputs allow exact class activation maps."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from training.models import graph, zoo
from training.models.resnet import normalize


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(1)
    model = zoo.create("R14x0.5", classes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "head" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("resolution", [32, 40, 65])
@pytest.mark.parametrize("multi_label", [False, True])
def test_onnx_runtime_answers_what_torch_answers(resolution: int, multi_label: bool) -> None:
    model = network(5)
    proto = graph.build(model, resolution, multi_label)  # type: ignore[arg-type]
    onnx.checker.check_model(proto, full_check=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, resolution, resolution, 3), dtype=np.uint8)
    with torch.inference_mode():
        logits = model(normalize(torch.from_numpy(pixels)))
    expected = torch.sigmoid(logits) if multi_label else torch.softmax(logits, 1)
    answered = session(proto).run(["probabilities"], {"pixels": pixels})[0]
    np.testing.assert_allclose(answered, expected.numpy(), atol=2e-5)


def test_feature_map_times_head_gives_the_class_activation_map_exactly() -> None:
    proto = graph.build(network(4), 64, False)  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    names = ["probabilities", "features", "feature_map", "head_weight"]
    probabilities, features, feature_map, head = session(proto).run(names, {"pixels": pixels})
    np.testing.assert_allclose(feature_map.mean((2, 3)), features, rtol=1e-4, atol=1e-5)
    maps = np.einsum("ndhw,dc->nchw", feature_map, head)
    logits = maps.mean((2, 3))  # without the bias, which is 0.3 · noise here, so compare differences of features · head
    np.testing.assert_allclose(logits, features @ head, rtol=1e-3, atol=1e-4)
    assert probabilities.shape == (2, 4)


def test_metadata_are_json() -> None:
    proto = graph.build(network(2), 32, False)  # type: ignore[arg-type]
    graph.set_metadata(proto, {"classes": ["a", "b"], "threshold": None})
    read = session(proto).get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in read.items()} == {"classes": ["a", "b"], "threshold": None}
