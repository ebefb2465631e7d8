"""What an export must hold before anybody is answered by it."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from services.inference.engine import Session
from services.inference.errors import Refused
from tests.services.exports import export


def test_an_export_that_answers_as_it_did_in_training_passes() -> None:
    assert Session(export()).check_golden() < 1e-6


def test_a_network_that_answers_nan_is_refused() -> None:
    proto = onnx.load_from_string(export())
    [head] = [one for one in proto.graph.initializer if one.name == "head_weight"]
    head.CopyFrom(numpy_helper.from_array(np.full((3, 2), np.nan, np.float32), "head_weight"))
    with pytest.raises(Refused, match="off by nan"):
        Session(proto.SerializeToString()).check_golden()


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"golden": []}, "no golden pictures"),
        ({"classes": ["dark"]}, "names 1 classes, the network answers 2"),
        ({"classes": ["dark", "bright", "more"]}, "names 3 classes, the network answers 2"),
    ],
)
def test_metadata_that_do_not_fit_the_network_are_refused(told: dict, reason: str) -> None:
    proto = onnx.load_from_string(export())
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    helper.set_model_props(proto, metadata | {key: json.dumps(value) for key, value in told.items()})
    with pytest.raises(Refused, match=reason):
        Session(proto.SerializeToString()).check_golden()
