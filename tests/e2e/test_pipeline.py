"""The whole way on tiny pictures, as a user types it: dvc repro, promotion, the service. In a copy of the project."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from services.preprocess import pixels
from tests.conftest import draw_folder
from training import serve, tracking
from training.demo.walk import classify, free_port

ROOT = Path(__file__).parents[2]
COPIED = ("training", "services", "params.yaml", "dvc.yaml", "tenants", ".dvc/config", ".dvcignore", ".gitignore")
PARAMS = {
    "upstream": {"arch": "R14x0.5", "weights": None},
    "pack": {},
    "pretrain": {"steps": 6, "global_batch": 8, "warmup_steps": 2, "resize": 40, "crop": 32, "checkpoint_every": 4},
    "finetune": {"steps": 5, "global_batch": 8, "resize": 40, "crop": 32, "scratch": True},
    "evaluate": {},
    "export": {"golden": 2},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh repository with two tenants and a finished `dvc repro`."""
    root = tmp_path_factory.mktemp("project")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "pictures*", "dvc.lock", "*.partial")
        shutil.copytree(source, root / name, ignore=ignore) if source.is_dir() else shutil.copy(source, root / name)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    draw_folder(root / "data" / "upstream", classes=4)
    for tenant in ("digits", "textures"):
        draw_folder(root / "tenants" / tenant / "pictures", classes=2, train=6, test=4)
    run(root, "git", "init", "-q")
    run(
        root,
        sys.executable,
        "-m",
        "dvc",
        "add",
        "-q",
        "data/upstream",
        *(f"tenants/{t}/pictures" for t in ("digits", "textures")),
    )
    repro(root)
    return root


def run(root: Path, *command: str, status: int = 0) -> str:
    environment = os.environ | {"PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # where Python leaves bytecode, nothing must run twice either
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def repro(root: Path, *arguments: str) -> set[str]:
    """`dvc repro`; returns the stages that ran."""
    said = run(root, sys.executable, "-m", "dvc", "repro", *arguments)
    return {line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")}


def receipt(root: Path, stage: str, tenant: str) -> dict:
    return json.loads((root / "runs" / stage / tenant / "receipt.json").read_text())


def is_blank(path: Path) -> bool:
    with Image.open(path) as image:
        return all(low == high for low, high in image.convert("RGB").getextrema())


def test_every_stage_leaves_a_receipt_that_names_its_inputs(project: Path) -> None:
    for tenant in ("digits", "textures"):
        packed, tuned = receipt(project, "pack", tenant), receipt(project, "finetune", tenant)
        exported, registered = receipt(project, "export", tenant), receipt(project, "register", tenant)
        assert tuned["inputs"]["data"] == packed["outputs"]["dataset"]["sha256"]
        assert packed["inputs"]["dvc.md5"].endswith(".dir")
        assert exported["metrics"]["max_difference"] < 1e-4
        assert registered["outputs"]["export"] == exported["outputs"]["export"]
        assert set(tuned["outputs"]) == {"transfer", "scratch"}
        for plot in (
            "finetune/{}/learning_curves.png",
            "evaluate/{}/confusion_matrix.png",
            "evaluate/{}/worst_mistakes.png",
        ):
            assert not is_blank(project / "runs" / plot.format(tenant))
    assert receipt(project, "finetune", "digits")["details"]["deviations"] == {
        "resize": 40,
        "crop": 32,
        "steps": 5,
        "global_batch": 8,
        "flips": False,
    }
    assert "| digits |" in (project / "runs" / "fleet" / "fleet.md").read_text()


def test_nothing_runs_twice(project: Path) -> None:
    assert repro(project) == set()


def test_mlflow_has_a_run_per_stage_with_lineage(project: Path) -> None:
    client = tracking.connect(f"sqlite:///{project}/.mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    by_stage = {found.data.tags["stage"]: found for found in runs}
    assert set(by_stage) == {"pack", "finetune", "evaluate", "export", "register"}
    assert all(found.info.status == "FINISHED" for found in runs)
    assert all(found.data.tags["dvc.md5"].endswith(".dir") for found in runs)
    tuned = by_stage["finetune"]
    assert tuned.data.params["hyperrule.crop"] == "32"
    assert tuned.data.params["finetune.flips"] == "False"
    history = client.get_metric_history(tuned.info.run_id, "loss")
    assert [point.step for point in history] == [5]
    version = tracking.version_at(client, "digits", "challenger")
    assert version is not None
    assert version.tags["sha256"] == receipt(project, "export", "digits")["outputs"]["export"]["sha256"]
    assert tracking.versions(client, tracking.UPSTREAM_MODEL)


def test_a_promoted_version_answers_over_http_as_its_golden_pictures_say(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    for tenant in ("digits", "textures"):
        assert "alias champion → version" in run(project, sys.executable, "-m", "training", "promote", tenant)
    picture = next((project / "tenants/digits/pictures/test").rglob("*.png"))
    with serve.running("sqlite:///.mlflow/mlflow.db", free_port(), free_port()) as (service, _):
        answer, probability, version, _ = classify(service, "digits", picture)
    import onnxruntime as ort

    session = ort.InferenceSession(str(project / "runs/export/digits/model.onnx"))
    expected = session.run(["probabilities"], {"pixels": pixels(picture.read_bytes(), 32)[None]})[0][0]
    assert answer == f"class-{expected.argmax()}"
    assert probability == f"{expected.max():.1%}"
    assert version == receipt(project, "register", "digits")["details"]["version"]


def test_serve_prints_both_addresses_and_stops_on_ctrl_c(project: Path) -> None:
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "training", "serve", "--port", str(ports[0]), "--mlflow-port", str(ports[1])]
    environment = os.environ | {"PYTHONPATH": str(project)}
    child = subprocess.Popen(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = [child.stdout.readline() for _ in range(3)]
    assert [str(port) in line for port, line in zip(ports, told, strict=False)] == [True, True]
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=40) == 0
    assert child.stdout.read() == "stopped\n"
    child.stdout.close()
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"something still listens on {port}"


def test_one_tenants_parameter_reruns_only_that_tenant_and_fleet(project: Path) -> None:
    path = project / "tenants" / "textures" / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["finetune"] = {"steps": 6}
    path.write_text(yaml.safe_dump(values))
    ran = repro(project)
    prefix = "tenants/textures/dvc.yaml:"
    assert ran == {prefix + stage for stage in ("finetune", "evaluate", "export", "register")} | {"fleet"}
    assert receipt(project, "register", "textures")["details"]["version"] == "2"
    assert repro(project, "tenants/digits/dvc.yaml") == set()


def test_a_version_that_does_not_exist_is_refused_with_the_choices(project: Path) -> None:
    said = run(project, sys.executable, "-m", "training", "promote", "digits", "--version", "9", status=2)
    assert "no version 9. Choices: 1." in said
