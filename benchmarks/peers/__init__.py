"""Other servers with the same file, each at the setting that was fastest here. Their environments: make .peers/<name>.

Every one decodes with services.preprocess and runs ONNX Runtime in two workers of one thread each: what differs is the server.
"""

import base64
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(".peers")


@dataclass(frozen=True)
class Peer:
    """python: of its environment; command: given that, a folder of its own and a port; body: of a request, given the picture."""

    python: str
    command: Callable[[str, Path, int], list[str]]
    path: str
    ready: str
    body: Callable[[bytes], bytes]
    media: str = "application/json"


def _litserve(python: str, folder: Path, port: int) -> list[str]:
    return [python, "-m", "benchmarks.peers.litserve_app", str(folder / "model.onnx"), str(port)]


def _mlserver(python: str, folder: Path, port: int) -> list[str]:
    settings = {
        "http_port": port,
        "grpc_port": port + 1,
        "metrics_port": port + 2,
        "metrics_dir": str(folder),
        "host": "127.0.0.1",
        "parallel_workers": 2,
        "debug": False,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "model", "implementation": "benchmarks.peers.mlserver_app.Export"}
    model["parameters"] = {"uri": str(folder / "model.onnx")}  # type: ignore[assignment]
    (folder / "model-settings.json").write_text(json.dumps(model))
    return [str(Path(python).with_name("mlserver")), "start", str(folder)]


def _mlflow(python: str, folder: Path, port: int) -> list[str]:
    saved = str(folder / "saved")
    script = f"from benchmarks.peers.mlflow_app import save; save({str(folder / 'model.onnx')!r}, {saved!r})"
    serve = f"{python} -m mlflow models serve -m {saved} --env-manager local --workers 2 --port {port}"
    return ["sh", "-c", f'{python} -c "{script}" && exec {serve}']


def _tensor(picture: bytes) -> bytes:
    data = base64.b64encode(picture).decode()
    return json.dumps({"inputs": [{"name": "picture", "shape": [1], "datatype": "BYTES", "data": [data]}]}).encode()


def _inputs(picture: bytes) -> bytes:
    return json.dumps({"inputs": [base64.b64encode(picture).decode()]}).encode()


PEERS = {
    "LitServe": Peer(str(ENVIRONMENTS / "litserve/bin/python"), _litserve, "/predict", "/health", _inputs),
    "MLServer": Peer(
        str(ENVIRONMENTS / "mlserver/bin/python"),
        _mlserver,
        "/v2/models/model/infer",
        "/v2/models/model/ready",
        _tensor,
    ),
    "mlflow models serve": Peer(sys.executable, _mlflow, "/invocations", "/ping", _inputs),
}
