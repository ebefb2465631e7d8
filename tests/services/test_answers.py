"""What classify and features answer beyond the plain picture: forms, embeddings, explanations, the access log."""

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from services import preprocess
from services.inference import bodies, explain, protocol
from services.inference.engine import Session
from services.inference.errors import BadRequest, DeadlineExceeded
from services.inference.exchange import Exchange
from services.inference.metrics import Metrics
from services.inference.models import Served
from services.inference.scheduler import Scheduler, Work
from tests.services.exports import SIDE, export, gray_png
from tests.services.running import Folder, Service, bit_serve


def form(*values: int) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{value}.png", gray_png(value))) for value in values]


def test_a_form_of_several_pictures_is_answered_in_order(lamps: Service) -> None:
    told = lamps.http.post("/v1/lamps/classify?top=1", files=form(10, 250, 10)).json()
    assert [one["predictions"][0]["class"] for one in told["answers"]] == ["dark", "bright", "dark"]
    assert [one["name"] for one in told["answers"]] == ["10.png", "250.png", "10.png"]
    assert told["version"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([*form(1, 2), ("file", ("x.png", b"no picture"))], "picture 2: not a picture"),
        (form(*range(65)), "at most 64 pictures"),
    ],
)
def test_a_form_that_cannot_be_answered_says_why(lamps: Service, files: list, said: str) -> None:
    answer = lamps.http.post("/v1/lamps/classify", files=files)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_broken_form_is_400(lamps: Service) -> None:
    for body, media in ((b"--x\r\nbroken", "multipart/form-data; boundary=x"), (b"", "multipart/form-data")):
        answer = lamps.http.post("/v1/lamps/classify", content=body, headers={"content-type": media})
        assert answer.status_code == 400, answer.text
        assert "form" in answer.json()["error"]


def test_a_form_that_is_cut_off_loses_no_picture_silently(lamps: Service) -> None:
    whole = lamps.http.build_request("POST", "/v1/lamps/classify", files=form(1, 250))
    body, media = whole.read(), whole.headers["content-type"]
    second = body.index(b"250.png")
    for end in (len(body) - 4, len(body) - 60, second + 40, second):
        answer = lamps.http.post("/v1/lamps/classify", content=body[:end], headers={"content-type": media})
        assert answer.status_code == 400, answer.text
        assert "cut off" in answer.json()["error"]


def stages(answer: httpx.Response) -> list[str]:
    return [stage.split(";")[0] for stage in answer.headers["server-timing"].split(", ")]


def test_the_time_of_a_load_and_of_an_explanation_is_told(lamps: Service) -> None:
    assert stages(lamps.classify("lamps", gray_png(1))) == ["queue", "decode", "infer"]
    assert stages(lamps.classify("lamps", gray_png(1), "?explain=1")) == ["queue", "decode", "infer", "explain"]
    assert lamps.http.post("/v2/repository/models/lamps/unload").status_code == 200
    assert stages(lamps.classify("lamps", gray_png(1))) == ["load", "queue", "decode", "infer"]
    text = lamps.http.get("/metrics").text
    assert all(f'stage="{stage}"' in text for stage in ("load", "explain"))


def test_an_error_tells_which_version_it_is_of(lamps: Service) -> None:
    answer = lamps.classify("lamps@challenger", b"no picture")
    assert answer.status_code == 400
    assert (answer.headers["x-model-name"], answer.headers["x-model-alias"]) == ("lamps", "challenger")
    assert answer.headers["x-model-version"] == lamps.classify("lamps@challenger", gray_png(1)).json()["version"]
    assert "x-model-name" not in lamps.classify("nobody", gray_png(1)).headers


def test_features_come_as_numbers_or_bytes(lamps: Service) -> None:
    in_json = lamps.http.post("/v1/lamps/features", content=gray_png(255)).json()
    assert in_json["features"] == pytest.approx([1, 1, 1])
    binary = lamps.http.post("/v1/lamps/features", files=form(255, 0), headers={"accept": "application/octet-stream"})
    shape = [int(side) for side in binary.headers["x-shape"].split(",")]
    rows = np.frombuffer(binary.content, np.float32).reshape(shape)
    np.testing.assert_allclose(rows, [[1, 1, 1], [-1, -1, -1]], atol=1e-6)


def half_bright() -> bytes:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:, SIDE // 2 :] = 255
    image[:, : SIDE // 2] = 120
    return cv2.imencode(".png", image)[1].tobytes()


def test_the_explanation_is_the_logit_place_by_place(lamps: Service) -> None:
    picture = half_bright()
    told = lamps.http.post("/v1/lamps/classify?explain=1", content=picture).json()
    assert told["explanation"]["class"] == "bright"
    heat = np.array(told["explanation"]["map"])
    # The test's export: the feature map is pixel / 127.5 − 1, its head adds all three channels for "bright".
    expected = (preprocess.pixels(picture, SIDE).astype(float) / 127.5 - 1).sum(2)
    np.testing.assert_allclose(heat, expected, atol=1e-3)
    odds = told["predictions"][0]["probability"] / told["predictions"][1]["probability"]
    assert 2 * heat.mean() == pytest.approx(np.log(odds), abs=1e-3)
    assert "explanation" not in lamps.http.post("/v1/lamps/classify", content=picture).json()


def test_the_overlay_is_the_picture_coloured_where_the_class_was_seen(lamps: Service) -> None:
    told = lamps.http.post("/v1/lamps/classify?explain=overlay", files=[("file", ("a.png", half_bright()))]).json()
    address = told["answers"][0]["explanation"]["overlay"]
    kind, _, data = address.partition(",")
    assert kind == "data:image/png;base64"
    image = preprocess.decode(base64.b64decode(data))
    assert image.shape == (SIDE, SIDE, 3)
    left, right = image[:, : SIDE // 2 - 2], image[:, SIDE // 2 + 2 :]
    assert np.ptp(left.astype(int).mean((0, 1))) < 3, "grey where nothing spoke for the class"
    assert np.ptp(right.astype(int).mean((0, 1))) > 30, "coloured where it did"


def test_an_overlay_decodes_no_more_of_a_photograph_than_it_shows(picture: Callable[..., bytes]) -> None:
    photograph = picture(2400, 1800, ".jpg")
    told = explain.overlay(photograph, np.zeros((4, 4), np.float32), 50_000_000)
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(told.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)
    scaled = preprocess.decode(photograph, explain.LONGEST_SIDE)
    assert scaled.shape[0] < 1800
    assert (shown == cv2.resize(scaled, (512, 384), interpolation=cv2.INTER_AREA)[..., ::-1]).all()


def test_a_large_answer_is_compressed_where_that_is_accepted(lamps: Service) -> None:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [64, SIDE, SIDE, 3]}
    request = {"inputs": [tensor | {"data": [3] * (64 * SIDE * SIDE * 3)}], "outputs": [{"name": "feature_map"}]}
    plain, packed, refused = (
        lamps.http.post("/v2/models/lamps/infer", json=request, headers={"accept-encoding": accepted})
        for accepted in ("identity", "gzip", "gzip;q=0, deflate ; q=0.000")
    )
    assert int(packed.headers["content-length"]) < len(plain.content) / 10
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert "content-encoding" not in refused.headers
    assert bodies.accepted(b"gzip;q=0, deflate;q=0.5") == b"deflate"


def test_more_numbers_than_json_can_hold_are_refused_with_what_can(lamps: Service) -> None:
    request = protocol.InferRequest(None, [], ("feature_map", "probabilities"), frozenset(), {})
    served = Served("lamps", "1", "0" * 64, Session(export()), 0.0, 0)
    rows = [np.zeros((64, 2048, 7, 7), np.float32), np.zeros((64, 2), np.float32)]
    with pytest.raises(BadRequest, match=r"feature_map, probabilities: 25,690,624 bytes .*binary_data"):
        protocol.render(served, "lamps", request, rows)
    _, length = protocol.render(served, "lamps", replace(request, binary=frozenset(["feature_map"])), rows)
    assert length
    twice = {
        "inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": [1] * SIDE * SIDE * 3}]
    }
    answer = lamps.http.post("/v2/models/lamps/infer", json=twice | {"outputs": [{"name": "features"}] * 2})
    assert answer.status_code == 400
    assert "once" in answer.json()["error"]


def test_each_request_is_one_line_of_the_access_log(lamps: Service) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"x-request-id": "mine-1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    answer = lamps.http.post("/v1/lamps/classify", content=gray_png(10), headers=headers)
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "mine-1"
    lamps.http.post("/v1/nobody/classify", content=gray_png(10), headers={"x-request-id": "mine-2"})
    by_id = {}
    end = time.monotonic() + 10  # a thread of its own writes the log
    while not {"mine-1", "mine-2"} <= set(by_id) and time.monotonic() < end:
        time.sleep(0.02)
        whole = lamps.log.read_text().rpartition("\n")[0].splitlines()
        by_id = {told["request_id"]: told for told in (json.loads(line) for line in whole if line.startswith("{"))}
    told = by_id["mine-1"]
    assert (told["tenant"], told["status"]) == ("lamps", 200)
    assert (told["trace_id"], told["parent_id"]) == (trace, "b7ad6b7169203331")
    assert {"queue_ms", "decode_ms", "infer_ms", "ms", "version", "path"} <= set(told)
    assert by_id["mine-2"]["status"] == 404


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"01-{TRACE}-{SPAN}-01-of-a-later-version", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        ("", False),
    ],
)
def test_a_trace_is_read_where_it_is_one(given: str, read: bool) -> None:
    scope = {"query_string": b"", "method": "POST", "path": "/"}
    exchange = Exchange("classify", "lamps", None, scope, {b"traceparent": given.encode()})
    assert exchange.trace() == ((TRACE, SPAN) if read else (None, None))


def test_the_pages_bodies_are_limited_too(lamps: Service) -> None:
    answer = lamps.http.post("/v2/repository/index", content=b"[" * 100_000)
    assert answer.status_code == 413
    assert "65,536 bytes" in answer.json()["error"]


def test_an_answer_that_is_no_single_piece_comes_whole(lamps: Service) -> None:
    """HEAD, a file, and a request whose client waits for 100 Continue."""
    assert lamps.http.head("/").headers["content-length"]
    assert lamps.http.head("/").content == b""
    assert len(lamps.http.get("/static/playground.js").content) > 1000
    told = lamps.http.post("/v1/lamps/classify", content=gray_png(10), headers={"expect": "100-continue"})
    assert told.json()["predictions"][0]["class"] == "dark"


def test_pictures_that_take_too_long_to_decode_are_413(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.publish("lamps", export())
    with bit_serve(store, tmp_path, "--max_decode_ms", "0.001") as service:
        assert service.classify("lamps", gray_png(10)).status_code == 200  # one is bounded by its pixels
        answer = service.http.post("/v1/lamps/classify", files=form(10, 250))
        assert answer.status_code == 413
        assert "1 of 2 pictures took the time of all to decode" in answer.json()["error"]


def test_bodies_that_are_still_coming_have_a_bound_together(tmp_path: Path) -> None:
    """Two clients hold most of the room for bodies; a third is told to come again, and is answered once they are gone."""
    store = Folder(tmp_path)
    store.publish("lamps", export())
    with bit_serve(store, tmp_path, "--max_bodies_mb", "1") as service:
        address = "127.0.0.1", int(service.url.rsplit(":", 1)[1])
        head = b"POST /v1/lamps/classify HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n"
        slow = [socket.create_connection(address, timeout=30) for _ in range(2)]
        for connection in slow:
            connection.sendall(head + b"x" * 450_000)
        picture = gray_png(10) + bytes(200_000)  # a decoder reads no further than the picture's end
        end = time.monotonic() + 20
        while (answer := service.classify("lamps", picture)).status_code != 503:  # until what was sent has come
            assert time.monotonic() < end
        assert "bodies of other requests fill 1,048,576 bytes" in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"
        for connection in slow:
            connection.close()
        while service.classify("lamps", picture).status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_an_unforeseen_error_fails_its_request_with_the_cause_and_not_the_worker() -> None:
    session = Session(export())
    broken = Session(export())
    broken.card = replace(broken.card, resolution=0)  # a picture cannot be resized to that: no PictureError

    async def ask(scheduler: Scheduler, session: Session) -> list[np.ndarray]:
        served = Served("lamps", "1", "0" * 64, session, 0.0, 0)
        answer: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        work = Work(served, [gray_png(250)], ("probabilities",), time.monotonic() + 60, answer)
        async with asyncio.timeout(20):
            return await scheduler.submit(work)

    async def ask_both() -> None:
        scheduler = Scheduler(1, 8, 5, 2000, 50_000_000, 2000, Metrics())
        try:
            with pytest.raises(RuntimeError, match="inference failed") as failed:
                await ask(scheduler, broken)
            assert isinstance(failed.value.__cause__, cv2.error)  # what the log's traceback shows
            [rows] = await ask(scheduler, session)
            assert rows.argmax() == 1
        finally:
            scheduler.close()

    asyncio.run(ask_both())


def test_explaining_ends_at_the_deadline_and_gives_way_to_answering(lamps: Service) -> None:
    told = [{"predictions": [{"class": "dark", "index": 0}]} for _ in range(2)]
    rows = [np.zeros((2, 3, SIDE, SIDE), np.float32), np.zeros((3, 2), np.float32)]
    with pytest.raises(DeadlineExceeded, match="before every picture was explained"):
        explain.explain(told, ["a", "b"], [gray_png(1)] * 2, rows, False, 10**6, time.monotonic() - 1)
    assert lamps.http.post("/v1/lamps/classify?explain=overlay", files=form(*range(64))).status_code == 200
    threads = Path(f"/proc/{lamps.process.pid}/task").iterdir()
    niceness = [int((thread / "stat").read_text().rpartition(")")[2].split()[16]) for thread in threads]
    assert explain.NICENESS in niceness
