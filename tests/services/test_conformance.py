"""Conformance of the Open Inference Protocol v2: Triton's own HTTP client, sync and asyncio."""

import asyncio
import base64
import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.services.exports import CLASSES, SIDE, gray_png
from tests.services.running import Service

Call = Callable[..., Any]


@pytest.fixture(params=["sync", "asyncio"])
def call(request: pytest.FixtureRequest, lamps: Service) -> Call:
    """call("get_model_metadata", "lamps") on either client: the same suite runs over both."""
    address = lamps.url.removeprefix("http://")

    def sync(method: str, *args: Any, **options: Any) -> Any:
        with triton.InferenceServerClient(address) as client:
            return getattr(client, method)(*args, **options)

    def by_asyncio(method: str, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with triton_aio.InferenceServerClient(address) as client:
                try:
                    return await getattr(client, method)(*args, **options), None
                except InferenceServerException as error:  # without its traceback, which holds on to the connection
                    return None, InferenceServerException(error.message(), error.status())

        answer, error = asyncio.run(run())
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            gc.collect()  # the client leaves the connection of an error open, and aiohttp tells so whenever it is found
        if error:
            raise error
        return answer

    return sync if request.param == "sync" else by_asyncio


def pixels_input(values: list[int], binary: bool = True) -> tuple[triton.InferInput, np.ndarray]:
    array = np.stack([np.full((SIDE, SIDE, 3), value, np.uint8) for value in values])
    tensor = triton.InferInput("pixels", list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor, array


def test_health_and_metadata(call: Call) -> None:
    assert call("is_server_live")
    assert call("is_server_ready")
    assert call("is_model_ready", "lamps")
    assert not call("is_model_ready", "nobody")
    assert set(call("get_server_metadata")) == {"name", "version", "extensions"}
    told = call("get_model_metadata", "lamps")
    assert told["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}]
    champion, challenger = told["versions"]  # all that can be asked for by this name
    assert call("is_model_ready", "lamps", challenger)
    assert call("get_model_metadata", "lamps", challenger)["versions"] == [challenger, champion]
    assert call("get_model_metadata", "lamps@challenger")["versions"] == [challenger]
    config = call("get_model_config", "lamps")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (
        64,
        [SIDE, SIDE, 3],
    )  # a request's, not a thread's


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_infer_in_json_and_binary(call: Call, binary_in: bool, binary_out: bool) -> None:
    tensor, _ = pixels_input([10, 250], binary_in)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("probabilities", "features")]
    answer = call("infer", "lamps", [tensor], outputs=wanted, request_id="7")
    assert answer.as_numpy("probabilities").argmax(1).tolist() == [0, 1]
    assert answer.as_numpy("features").shape == (2, 3)
    assert answer.get_response()["id"] == "7"
    assert call("infer", "lamps", [tensor]).as_numpy("probabilities").shape == (2, 2)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_infer_compressed_both_ways(call: Call, algorithm: str) -> None:
    tensor, _ = pixels_input([10] * 40)
    answer = call(
        "infer",
        "lamps",
        [tensor],
        outputs=[triton.InferRequestedOutput("feature_map")],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert answer.as_numpy("feature_map").shape == (40, 3, SIDE, SIDE)


@pytest.mark.parametrize("binary", [True, False])
def test_classification_names_the_best_classes(call: Call, binary: bool) -> None:
    tensor, _ = pixels_input([10, 250])
    wanted = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=1)]
    best = call("infer", "lamps", [tensor], outputs=wanted).as_numpy("probabilities")
    assert best.shape == (2, 1)
    texts = [value.decode() if isinstance(value, bytes) else value for value in best.ravel()]
    assert [text.split(":")[1:] for text in texts] == [["0", "dark"], ["1", "bright"]]


def test_encoded_pictures_go_in_as_bytes(call: Call) -> None:
    tensor = triton.InferInput("picture", [2], "BYTES")
    tensor.set_data_from_numpy(np.array([gray_png(10), gray_png(250)], dtype=np.object_))
    assert call("infer", "lamps", [tensor]).as_numpy("probabilities").argmax(1).tolist() == [0, 1]


def test_encoded_pictures_go_in_as_base64_in_json(lamps: Service) -> None:
    def ask(*data: Any) -> Any:
        tensor = {"name": "picture", "shape": [len(data)], "datatype": "BYTES", "data": data}
        return lamps.http.post("/v2/models/lamps/infer", json={"inputs": [tensor]})

    dark, bright = (base64.b64encode(gray_png(value)).decode() for value in (10, 250))
    rows = np.array(ask(dark, [bright]).json()["outputs"][0]["data"]).reshape(2, 2)
    assert rows.argmax(1).tolist() == [0, 1]
    for wrong in ("no base64!", 7, None):
        assert "as base64" in ask(wrong).json()["error"]


def test_shared_memory_in_a_request_is_told_apart(call: Call) -> None:
    tensor, _ = pixels_input([10])
    output = triton.InferRequestedOutput("probabilities")
    output.set_shared_memory("region", 8)
    with pytest.raises(InferenceServerException, match="no shared memory"):
        call("infer", "lamps", [tensor], outputs=[output])
    tensor.set_shared_memory("region", 768)
    with pytest.raises(InferenceServerException, match="no shared memory"):
        call("infer", "lamps", [tensor])


def test_the_sync_client_asks_without_waiting(lamps: Service) -> None:
    tensor, _ = pixels_input([250])
    with triton.InferenceServerClient(lamps.url.removeprefix("http://")) as client:
        asked = client.async_infer("lamps", [tensor], priority=1, timeout=1_000_000, request_id="9")
        assert asked.get_result().as_numpy("probabilities").argmax() == 1


def test_a_body_without_json_is_one_picture(lamps: Service) -> None:
    answer = lamps.http.post(
        "/v2/models/lamps/infer", content=gray_png(250), headers={"Inference-Header-Content-Length": "0"}
    )
    length = int(answer.headers["inference-header-content-length"])
    assert np.frombuffer(answer.content[length:], np.float32).argmax() == 1


def test_versions_and_aliases_are_addresses(call: Call) -> None:
    tensor, _ = pixels_input([10])
    champion = call("get_model_metadata", "lamps")["versions"][0]
    challenger = call("get_model_metadata", "lamps@challenger")["versions"][0]
    assert champion != challenger
    by_version = call("infer", "lamps", [tensor], model_version=challenger)
    assert by_version.get_response()["model_version"] == challenger
    assert by_version.as_numpy("probabilities").argmax() == 1  # it answers the other way round
    assert call("infer", "lamps@challenger", [tensor]).as_numpy("probabilities").argmax() == 1


def test_statistics_count_what_was_answered(call: Call) -> None:
    def counted() -> dict[str, Any]:
        return call("get_inference_statistics", "movers")["model_stats"][0]

    before = counted()
    tensor, _ = pixels_input([1, 2, 3])
    call("infer", "movers", [tensor])
    after = counted()
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 1
    assert after["inference_stats"]["compute_infer"]["ns"] > before["inference_stats"]["compute_infer"]["ns"]
    names = {one["name"] for one in call("get_inference_statistics")["model_stats"]}
    assert {"lamps", "movers"} <= names


def test_the_repository_lists_loads_and_unloads(call: Call) -> None:
    assert {(one["name"], one["state"]) for one in call("get_model_repository_index")} == {
        ("lamps", "READY"),
        ("lamps@challenger", "READY"),
        ("movers", "READY"),
    }
    call("unload_model", "movers")
    assert not call("is_model_ready", "movers")
    states = {one["name"]: one["state"] for one in call("get_model_repository_index")}
    assert states["movers"] == "UNAVAILABLE"
    call("load_model", "movers")
    assert call("is_model_ready", "movers")
    with pytest.raises(InferenceServerException, match="come from the registry"):
        call("load_model", "movers", config="{}")


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("get_model_metadata", ["nobody"], "not served"),
        ("load_model", ["nobody"], "not served"),
        ("unload_model", ["nobody"], "not served"),
        ("get_trace_settings", [], "no trace or log settings"),
        ("get_log_settings", [], "no trace or log settings"),
        ("get_system_shared_memory_status", [], "shared memory"),
        ("get_cuda_shared_memory_status", [], "shared memory"),
        ("register_system_shared_memory", ["region", "key", 10], "shared memory"),
        ("unregister_system_shared_memory", ["region"], "shared memory"),
        ("unregister_cuda_shared_memory", [], "shared memory"),
        ("update_log_settings", [{"log_info": True}], "no trace or log settings"),
        ("update_trace_settings", ["lamps", {"trace_level": ["OFF"]}], "no trace or log settings"),
    ],
)
def test_what_does_not_apply_is_said_in_the_protocols_form(
    call: Call, method: str, arguments: list[str], said: str
) -> None:
    with pytest.raises(InferenceServerException, match=said):
        call(method, *arguments)


def test_every_class_has_a_name(lamps: Service) -> None:
    assert lamps.http.get("/v2/models/lamps").json()["parameters"]["classes"] == CLASSES
