"""Requests made to hurt: each is answered in the API's own form, and costs the service neither memory nor anybody else's time."""

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client import generate_latest

from services.inference import bodies
from services.inference.errors import BadRequest, TooLarge
from services.inference.exchange import Exchange
from services.inference.metrics import Metrics
from services.inference.tally import Tally
from tests.services.exports import SIDE, gray_png
from tests.services.running import Service

COUNT = SIDE * SIDE * 3


def infer(lamps: Service, **changed: object) -> tuple[int, str]:
    """Status and error of an infer request whose one tensor differs from a good one."""
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": [0] * COUNT} | changed
    answer = lamps.http.post("/v2/models/lamps/infer", json={"inputs": [tensor]})
    return answer.status_code, answer.json().get("error", "")


def peak_mb(service: Service) -> float:
    with open(f"/proc/{service.process.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


def test_numbers_in_json_are_never_guessed_at(lamps: Service) -> None:
    before = peak_mb(lamps)
    for data in (["x" * 100_000, *[""] * (COUNT - 1)], [True] * COUNT, [1.0] * COUNT, ["1"] * COUNT, {}, [[]] * COUNT):
        status, error = infer(lamps, data=data)
        assert (status, f"{COUNT} integers" in error) == (400, True), error
    assert peak_mb(lamps) - before < 50  # the first makes 300 MB where numpy is asked what it is
    assert "ragged" in infer(lamps, data=[[0] * COUNT, [0]])[1]
    rows = [[[[7] * 3] * SIDE] * SIDE]
    assert infer(lamps, data=rows) == infer(lamps, data=[7] * COUNT) == (200, "")


@pytest.mark.parametrize("shape", [[1, 16.0, 16, 3], [True, 16, 16, 3], [1, 16, 16, "3"], [10**30, 16, 16, 3], 7])
def test_a_shape_that_only_equals_the_right_one_is_refused(lamps: Service, shape: object) -> None:
    assert infer(lamps, shape=shape)[0] == 400


def test_what_is_wrong_is_told_in_short(lamps: Service) -> None:
    deep = b"[" * 1000 + b"]" * 1000
    for request in (
        b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, %s]}]}' % deep,
        b'{"inputs": [{"name": "picture", "datatype": "BYTES", "shape": [%s], "data": [""]}]}' % deep,
        b'{"inputs": [{"name": "picture", "datatype": "BYTES", "shape": [1], "data": [""]}], "id": %s}' % deep,
        b'{"inputs": [{"name": "picture"}], "outputs": [{"name": %s}]}' % deep,
        b'{"inputs": [{"name": "pixels", "datatype": "%s"}]}' % (b"x" * 100_000),
    ):
        answer = lamps.http.post("/v2/models/lamps/infer", content=request)
        assert answer.status_code == 400
        assert len(answer.json()["error"]) < 500


@pytest.mark.parametrize("where", ["body", "before binary tensors"])
def test_json_that_takes_long_to_read_is_refused_unread(lamps: Service, where: str) -> None:
    before = peak_mb(lamps)
    for text in (b"[" + b"[]," * 1_300_000 + b"[]]", b'{"inputs": [' + b'"ab",' * 1_000_000 + b"1]}"):
        headers = {"inference-header-content-length": str(len(text))} if where != "body" else {}
        answer = lamps.http.post("/v2/models/lamps/infer", content=text, headers=headers)
        assert answer.status_code == 413
        assert "Send binary tensors" in answer.json()["error"]
    assert peak_mb(lamps) - before < 40
    largest = [[[[255] * 3] * 480] * 480]  # of a usual picture: it is read, and told what fits
    assert "[n, 16, 16, 3]" in infer(lamps, shape=[1, 480, 480, 3], data=largest)[1]


def test_many_empty_pictures_are_counted_before_they_are_made(lamps: Service) -> None:
    raw = bytes(4) * 1_000_000
    tensor = {"name": "picture", "datatype": "BYTES", "shape": [1_000_000]}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    answer = lamps.http.post(
        "/v2/models/lamps/infer", content=head + raw, headers={"inference-header-content-length": str(len(head))}
    )
    assert (answer.status_code, "at most 64 pictures" in answer.json()["error"]) == (400, True)
    assert "at most 64 pictures" in infer(lamps, name="picture", datatype="BYTES", shape=[65], data=[""] * 65)[1]


def test_numbers_of_thousands_of_digits_are_400(lamps: Service) -> None:
    assert lamps.http.post(f"/v1/lamps/classify?top={'9' * 5000}", content=b"x").status_code == 400
    headers = {"inference-header-content-length": "9" * 5000}
    assert lamps.http.post("/v2/models/lamps/infer", content=b"{}", headers=headers).status_code == 400


def test_a_form_has_a_number_of_fields(lamps: Service) -> None:
    def ask(count: int) -> httpx.Response:
        field = b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n'
        picture = (
            b'--x\r\ncontent-disposition: form-data; name="b"; filename="b"\r\n\r\n' + gray_png(250) + b"\r\n--x--\r\n"
        )
        media = {"content-type": "multipart/form-data; boundary=x"}
        return lamps.http.post("/v1/lamps/classify", content=field * count + picture, headers=media)

    assert ask(64).json()["answers"][0]["predictions"][0]["class"] == "bright"
    answer = ask(200_000)
    assert (answer.status_code, "more than 64 fields" in answer.json()["error"]) == (400, True)


def test_a_long_form_holds_up_nobody(lamps: Service) -> None:
    """7 MB of almost-boundaries, which the parser looks at one by one: more than a second."""
    head = b'--x\r\ncontent-disposition: form-data; name="b"; filename="b"\r\n\r\n'
    body = head + b"\r\n--xy" * 1_200_000 + b"\r\n--x--\r\n"
    with ThreadPoolExecutor(1) as pool:
        media = {"content-type": "multipart/form-data; boundary=x"}
        asked = pool.submit(httpx.post, f"{lamps.url}/v1/lamps/classify", content=body, headers=media, timeout=60)
        slowest_s = 0.0
        while not asked.done():
            began = time.monotonic()
            lamps.http.get("/v2/health/live")
            slowest_s = max(slowest_s, time.monotonic() - began)
    assert asked.result().status_code == 400
    assert slowest_s < 0.5


def test_all_members_of_a_gzip_body_are_read() -> None:
    members = gzip.compress(b"one ") + gzip.compress(b"two ") + gzip.compress(b"three" * 50_000)
    assert bodies.decompress(members, 31, 10**6) == gzip.decompress(members)
    for body, said in (
        (members[:-4], "cut off"),
        (members + b"more", "cannot be decompressed"),
        (gzip.compress(b"") * 20_000, "too many"),
    ):
        with pytest.raises(BadRequest, match=said):
            bodies.decompress(body, 31, 10**6)
    with pytest.raises(TooLarge):
        bodies.decompress(gzip.compress(bytes(600_000)) * 2, 31, 10**6)


def test_what_cannot_be_counted_does_not_end_the_counting() -> None:
    tally = Tally(Metrics(), None)
    good = Exchange("infer", "lamps", None, {"method": "POST", "path": "/"}, {})
    bad = Exchange("infer", "lamps", None, {}, {})
    bad.served = good  # type: ignore[assignment]  # has no statistics
    tally.note(bad, 200, 0)
    time.sleep(0.2)
    tally.note(good, 404, 0)
    end = time.monotonic() + 5
    while b'status="404"' not in generate_latest(tally.metrics.registry):
        assert time.monotonic() < end
        time.sleep(0.02)
    tally.close()
