"""/openapi.json against the running service: what is drawn from it, and what it must not forget."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import tritonclient.http as triton
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CheckContext, not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from services.inference.engine import OUTPUTS
from tests.services.exports import SIDE, export, gray_png
from tests.services.running import Folder, Service, bit_serve

BINARY = "application/octet-stream"
OF_HTTP = {"content-type", "content-length", "connection", "date"}  # that every answer has, or that has its own place
DRAW = settings(max_examples=12, deadline=None, phases=[Phase.generate], database=None)
FEATURES, INFER = "/v1/{name}/features", "/v2/models/{name}/infer"


def nothing_is_left_out(_: CheckContext, answer: schemathesis.Response, case: schemathesis.Case) -> None:
    """Schemathesis misses what is described and doesn't come; this is the other way round."""
    told = case.operation.responses.find_by_status_code(answer.status_code)
    assert told is not None, f"{answer.status_code} is not described"
    unknown = set(answer.headers) - OF_HTTP - {name.lower() for name, _ in told.headers.items()}
    assert not unknown, f"{case.operation.label} answers {answer.status_code} with {unknown}, which it does not tell"


def is_read(case: schemathesis.Case) -> None:
    """That a request as this one is described: its media type and its headers."""
    assert case.media_type in {body.media_type for body in case.operation.body}
    told = {parameter.name.lower() for parameter in case.operation.headers}
    assert {name.lower() for name in case.headers} <= told | {"accept"}  # OpenAPI: Accept is described by the answers


@st.composite
def infer_bodies(draw: st.DrawFn) -> tuple[bytes, int | None, bool]:
    """Body, length of its JSON where tensors follow it, and whether the answer is binary; made by Triton's client."""
    if draw(st.booleans(), label="one picture"):
        return gray_png(250), 0, True
    value, count = draw(st.integers(0, 255)), draw(st.integers(1, 40))
    if draw(st.booleans(), label="encoded"):
        tensor = triton.InferInput("picture", [count], "BYTES")
        tensor.set_data_from_numpy(np.array([gray_png(value)] * count, dtype=np.object_))
    else:
        tensor = triton.InferInput("pixels", [count, SIDE, SIDE, 3], "UINT8")
        tensor.set_data_from_numpy(np.full((count, SIDE, SIDE, 3), value, np.uint8), binary_data=draw(st.booleans()))
    asked = draw(st.dictionaries(st.sampled_from(OUTPUTS), st.booleans(), min_size=1))
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name, binary in asked.items()]
    body, length = triton.InferenceServerClient.generate_request_body([tensor], outputs=outputs)
    return body, length, any(asked.values())


@pytest.fixture
def described(lamps: Service) -> Any:
    return schemathesis.openapi.from_url(f"{lamps.url}/openapi.json")


@pytest.mark.parametrize("known", [True, False])
def test_the_description_is_true(lamps: Service, described: Any, known: bool) -> None:
    """Schemathesis draws requests, good and bad, from /openapi.json and holds the answers against it."""
    version = lamps.http.get("/v2/models/lamps").json()["versions"][0]
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) == 21
    for operation in operations:

        @given(case=operation.as_strategy())
        @DRAW
        def holds(case: schemathesis.Case) -> None:
            if known:
                case.path_parameters |= {"name": "lamps", "version": version} if case.path_parameters else {}
            # No schema tells what a picture is; names were chosen here; 504 is described, and 500 is not.
            case.call_and_validate(
                additional_checks=[nothing_is_left_out],
                excluded_checks=[positive_data_acceptance, negative_data_rejection, not_a_server_error],
            )

        holds()


@pytest.mark.parametrize("path", [INFER, "/v2/models/{name}/versions/{version}/infer"])
def test_binary_tensors_are_described(lamps: Service, described: Any, path: str) -> None:
    """Requests that no schema can draw: JSON and tensors in one body, or one picture."""
    version = lamps.http.get("/v2/models/lamps").json()["versions"][0]
    seen = set()

    @given(made=infer_bodies(), coding=st.sampled_from(["gzip", "deflate", "identity"]))
    @settings(DRAW, max_examples=120, derandomize=True)  # all kinds of bodies must be among them
    def holds(made: tuple[bytes, int | None, bool], coding: str) -> None:
        body, length, binary = made
        headers = {"Accept-Encoding": coding} | (
            {} if length is None else {"Inference-Header-Content-Length": str(length)}
        )
        case = described[path]["POST"].Case(
            path_parameters={"name": "lamps", "version": version},
            headers=headers,
            body=json.loads(body) if length is None else body,
            media_type="application/json" if length is None else BINARY,
        )
        is_read(case)
        answer = case.call_and_validate(additional_checks=[nothing_is_left_out])
        assert (answer.status_code, answer.headers["content-type"]) == (200, [BINARY if binary else "application/json"])
        assert ("inference-header-content-length" in answer.headers) == binary
        if binary:  # the answer comes apart as it is described
            [json_length] = map(int, answer.headers["inference-header-content-length"])
            outputs = json.loads(answer.content[:json_length])["outputs"]
            sizes = [one["parameters"]["binary_data_size"] for one in outputs if "parameters" in one]
            assert json_length + sum(sizes) == len(answer.content)
        if "content-encoding" in answer.headers:
            assert answer.headers["content-encoding"] == [coding]
        seen.add((length is None, binary, "content-encoding" in answer.headers))

    holds()
    assert {(False, True, False), (False, True, True), (False, False, False), (True, True, False)} <= seen


@pytest.mark.parametrize("accept", [BINARY, "application/json"])
def test_binary_features_are_described(described: Any, accept: str) -> None:
    @given(
        value=st.integers(0, 255),
        request_id=st.none() | st.from_regex(r"[!-~]{1,140}", fullmatch=True),
    )
    @DRAW
    def holds(value: int, request_id: str | None) -> None:
        headers = {"Accept": accept} | ({} if request_id is None else {"X-Request-Id": request_id})
        case = described[FEATURES]["POST"].Case(
            path_parameters={"name": "lamps"}, headers=headers, body=gray_png(value), media_type=BINARY
        )
        is_read(case)
        answer = case.call_and_validate(additional_checks=[nothing_is_left_out])
        assert (answer.status_code, answer.headers["content-type"]) == (200, [accept])
        assert answer.headers.get("x-shape") == (["1,3"] if accept == BINARY else None)
        assert request_id is None or answer.headers["x-request-id"] == [request_id[:128]]

    holds()


def test_refusals_are_described(tmp_path: Path) -> None:
    """Who must show a key is told how, and who must come again is told when."""
    store, file = Folder(tmp_path), tmp_path / "tenants.json"
    for tenant in ("cold", "slow"):
        store.publish(tenant, export())
    keys: dict[str, dict[str, Any]] = {
        tenant: {"keys": [sha256(tenant.encode()).hexdigest()]} for tenant in ("cold", "slow")
    }
    keys["slow"] |= {"requests_per_s": 0.01}
    file.write_text(json.dumps(keys))
    with bit_serve(store, tmp_path, "--tenants", str(file), "--cold", "refuse") as service:
        described = schemathesis.openapi.from_url(f"{service.url}/openapi.json")

        def ask(path: str, tenant: str, key: str, **headers: str) -> schemathesis.Response:
            case = described[path]["POST"].Case(
                path_parameters={"name": tenant, "version": "0"},
                headers={"X-Api-Key": key, **headers},
                body=gray_png(10),
                media_type=BINARY,
            )
            return case.call_and_validate(additional_checks=[nothing_is_left_out], excluded_checks=[not_a_server_error])

        service.http.post("/v2/repository/models/cold/unload", headers={"x-api-key": "cold"})
        for path in ("/v1/{name}/classify", FEATURES, INFER):
            refused = [
                ask(path, "cold", ""),
                ask(path, "cold", "slow"),
                ask(path, "cold", "cold", **{"Content-Encoding": "br"}),
            ]
            assert [answer.status_code for answer in refused] == [401, 403, 415]
            assert refused[0].headers["www-authenticate"] == ["Bearer"]
        unloaded = ask(FEATURES, "cold", "cold")
        assert (unloaded.status_code, unloaded.headers["retry-after"]) == (503, ["2"])
        too_many = [ask(FEATURES, "slow", "slow") for _ in range(3)][-1]
        assert (too_many.status_code, len(too_many.headers["retry-after"])) == (429, 1)


def test_what_is_not_ready_yet_is_described(tmp_path: Path) -> None:
    with bit_serve(Folder(tmp_path / "missing"), tmp_path, ready=False) as service:
        described = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        answer = (
            described["/v2/health/ready"]["GET"]
            .Case()
            .call_and_validate(additional_checks=[nothing_is_left_out], excluded_checks=[not_a_server_error])
        )
        assert (answer.status_code, answer.json()) == (503, {"ready": False})
