"""Speed of the service as a share of what the machine can do without any HTTP, all features on: keys, quotas, log, metrics.

    make bench-serving            LitServe, MLServer and `mlflow models serve` beside it, each in an environment of its own
    python -m benchmarks.serving  the service alone; --rounds 1 for a quick look

A real process, a body of 40 kB of JPEG, a network of half a GFLOP (this project's own, R14x0.5 at 176 pixels) and a trivial one
that takes 224 pixels and averages them. In every round each server is measured between two measurements of the limit
(benchmarks/limit.py), so that a machine that slows down slows both, and for two seconds, so that many rounds fit into little
time; a figure is the median over the rounds, with the quartiles of the ratios beside it. The load's generator (wrk) takes its
share of the same cores: about 20 µs a request.
"""

import argparse
import base64
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import torch

from benchmarks import machine, wrk
from benchmarks.limit import Limit
from benchmarks.peers import PEERS, Peer
from benchmarks.wrk import Request
from services import preprocess
from tests.services.running import Folder, bit_serve, wait_for
from tests.services.test_tenants import make_key
from training.demo.walk import free_port
from training.models import graph, zoo

CONNECTIONS = (1, 8, 32, 64)
BODY_BYTES = 40_000
ARCH, SIDE = "R14x0.5", 176  # 0.49 GFLOP
GOALS = {("half a GFLOP", 8): 0.88, ("half a GFLOP", 32): 0.93, ("half a GFLOP", 64): 0.93, ("trivial", 32): 0.85}
MOST = {"ready_s": 1.5, "over_models_mb": 60, "extra_ms": 0.5}  # at one connection; of this service, whatever it serves
Figures = dict[str, Any]
Server = tuple[str, Request, int, Figures]  # address, what to ask, process, what its start cost


def half_a_gflop() -> bytes:
    torch.manual_seed(0)
    model = zoo.create(ARCH, 10).eval()
    torch.nn.init.normal_(model.head.weight, std=0.01)
    return described(graph.build(model, SIDE, multi_label=False), SIDE)


def trivial() -> bytes:
    """224 pixels a side, the mean colour, a head of ten classes."""
    side = 224
    nodes = [
        onnx.helper.make_node("Cast", ["pixels"], ["float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["float"], ["features"], axes=[1, 2], keepdims=0),
        onnx.helper.make_node("MatMul", ["features", "head"], ["logits"]),
        onnx.helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    into = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["N", side, side, 3])
    out = onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["N", 10])
    head = onnx.numpy_helper.from_array(np.full((3, 10), 0.01, np.float32), "head")
    made = onnx.helper.make_graph(nodes, "trivial", [into], [out], [head])
    return described(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), side)


def described(proto: onnx.ModelProto, side: int) -> bytes:
    """With the metadata that make an export of it."""
    told = {
        "format": 1,
        "classes": [str(n) for n in range(10)],
        "multi_label": False,
        "resolution": side,
        "resize": "squash",
    }
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    encoded = picture()
    [[answer]] = session.run(["probabilities"], {"pixels": preprocess.pixels(encoded, side)[None]})
    golden = [{"picture": base64.b64encode(encoded).decode(), "probabilities": answer.tolist()}]
    told |= {"threshold": None, "hyperrule": {}, "metrics": {}, "lineage": {"arch": ARCH}, "golden": golden}
    graph.set_metadata(proto, told)
    return proto.SerializeToString()


def picture() -> bytes:
    """A JPEG of 500 × 375 pixels and about 40 kB: coarse noise, as much detail as fits."""
    coarse = np.random.default_rng(0).integers(0, 256, (94, 125, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC)
    encoded = [cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, q])[1].tobytes() for q in range(20, 96, 3)]
    return min(encoded, key=lambda data: abs(len(data) - BODY_BYTES))


NETWORKS = {"half a GFLOP": half_a_gflop, "trivial": trivial}


@contextmanager
def ours(folder: Path, data: bytes, body: bytes) -> Iterator[Server]:
    """bit-serve with keys and quotas; yields its address, a request, and what its start cost."""
    file, store = folder / "tenants.json", Folder(folder)
    key = make_key(file, "bench")
    quotas = json.loads(file.read_text())
    quotas["bench"] |= {"requests_per_s": 1e6, "bytes_per_s": 1e12, "concurrent": 10_000}
    file.write_text(json.dumps(quotas))
    store.publish("bench", data)
    began = time.perf_counter()
    with bit_serve(store, folder, "--tenants", str(file)) as service:
        ready_s = time.perf_counter() - began
        request = Request("/v1/bench/classify", body, {"Authorization": f"Bearer {key}"})
        memory = private_mb(service.process.pid)
        lines = [line.split() for line in service.http.get("/metrics").text.splitlines()]
        models = sum(float(line[1]) for line in lines if line[0].startswith("bit_model_bytes{")) / 2**20
        start = {"ready_s": round(ready_s, 2), "memory_mb": memory, "over_models_mb": round(memory - models)}
        yield service.url, request, service.process.pid, start


@contextmanager
def theirs(peer: Peer, folder: Path, data: bytes, body: bytes) -> Iterator[Server]:
    (folder / "model.onnx").write_bytes(data)
    port = free_port()
    command = peer.command(peer.python, folder, port)
    paths = os.environ | {"PYTHONPATH": str(Path.cwd())}
    began = time.perf_counter()
    with (folder / "server.log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=paths, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}{peer.ready}", 120, folder / "server.log")
        request = Request(peer.path, peer.body(body), {"Content-Type": peer.media})
        ready_s = time.perf_counter() - began
        yield f"http://127.0.0.1:{port}", request, child.pid, {"ready_s": round(ready_s, 2)}
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # some wait for ever for workers that got the same SIGTERM
        child.wait()


def private_mb(pid: int) -> int:
    """Memory that ends with the process: what several share (libraries) counts once per machine, not here."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)


def session_s(leader: int) -> float:
    """Processor time of a process and of all that it started, as far as they still run."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = status.read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == leader else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def settle(leader: int) -> None:
    """Waits until a server has ended what the load left behind, up to half a second of work, which would slow the limit down.

    Raises RuntimeError where it never rests.
    """
    used_s = [session_s(leader)]
    while len(used_s) < 3 or used_s[-1] - used_s[-3] > 0.02:
        if len(used_s) > 100:
            raise RuntimeError(f"a server is still busy {len(used_s) * 0.2:.0f} seconds after its load")
        time.sleep(0.2)
        used_s.append(session_s(leader))


def measure(server: Server, files: tuple[Path, Path], rounds: int, seconds: int) -> Figures:
    """Ratios to the limit by number of connections, and the extra milliseconds of one connection.

    by_cpu: the same ratios, of the processor time that a picture takes: whatever else the machine does, it hardly moves.
    """
    url, request, process, figures = server
    ratios: dict[int, list[float]] = {number: [] for number in CONNECTIONS}
    by_cpu: dict[int, list[float]] = {number: [] for number in CONNECTIONS}
    extra_ms, rates = [], []
    with Limit(*files) as limit:
        wrk.load(url, request, max(CONNECTIONS), 1)  # warms up
        settle(process)
        for _ in range(rounds):
            before = limit.together(seconds / 2)
            for number in CONNECTIONS:
                used_s = session_s(process)
                result = wrk.load(url, request, number, seconds)
                used_s = session_s(process) - used_s + result["cpu_s"]
                settle(process)
                after = limit.together(seconds / 2)
                by_cpu[number].append((before["cpu_s"] + after["cpu_s"]) / 2 / (used_s / result["requests"]))
                ratios[number].append(result["rate"] * 2 / (before["rate"] + after["rate"]))
                rates.append(after["rate"])
                before = after
            alone_ms = limit.alone(seconds / 2)["p50_ms"]
            extra_ms.append(
                wrk.load(url, request, 1, seconds)["p50_ms"] - (alone_ms + limit.alone(seconds / 2)["p50_ms"]) / 2
            )
    return figures | {
        "ratios": medians(ratios),
        "quartiles": {
            str(number): np.percentile(of_number, [25, 75]).round(3).tolist() for number, of_number in ratios.items()
        },
        "by_cpu": medians(by_cpu),
        "extra_ms": round(statistics.median(extra_ms), 2),
        "limit_per_s": round(statistics.median(rates)),
    }


def medians(values: dict[int, list[float]]) -> dict[str, float]:
    return {str(number): round(statistics.median(of_number), 3) for number, of_number in values.items()}


def short_of(network: str, told: Figures) -> Iterator[str]:
    """What misses its goal, in words."""
    for (where, number), goal in GOALS.items():
        if where == network and (ratio := told["ratios"][str(number)]) < goal:
            yield f"below the goal of {goal} at {number} connections: {ratio}"
    for figure, most in MOST.items():
        if told[figure] > most:
            yield f"above the goal of {figure} ≤ {most}: {told[figure]}"


def import_s() -> float:
    """Of a fresh interpreter, the least of five."""
    code = "import time; t = time.perf_counter(); import services.inference.app; print(time.perf_counter() - t)"
    return min(
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout) for _ in range(5)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=2, help="of each load")
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="networks to serve")
    arguments = parser.parse_args()
    described, figures = machine.describe("onnxruntime", "uvicorn", "numpy"), {"import_s": round(import_s(), 3)}
    print(f"import of the service: {figures['import_s']} s")
    body = picture()
    for network in arguments.only:
        data = NETWORKS[network]()
        servers = ["bit-serve", *(PEERS if arguments.peers else ())]
        for name in servers:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                files = folder / "limit.bin", folder / "picture.jpg"
                files[0].write_bytes(data)
                files[1].write_bytes(body)
                running = ours(folder, data, body) if name == "bit-serve" else theirs(PEERS[name], folder, data, body)
                with running as server:
                    told = measure(server, files, arguments.rounds, arguments.seconds)
            figures[f"{network}: {name}"] = told
            print(f"{network:>12}  {name:20} {json.dumps(told)}", flush=True)
            for short in short_of(network, told) if name == "bit-serve" else ():
                print(f"{'':14}{short}")
    machine.write("serving", described | {"body_bytes": len(body)}, figures)


if __name__ == "__main__":
    main()
