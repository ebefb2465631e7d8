"""The images, built and started for real: contents, sizes, a golden request and a training, read-only and without rights."""

import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import httpx
import pytest

from tests.clusters import wait_for as wait_until
from tests.conftest import draw_folder
from tests.images.build import COPIED, ROOT, alone, base, build, buildah, lacking, storage
from tests.images.containers import configuration, container, execute, rootfs
from tests.services.exports import export, gray_png
from training.demo.walk import free_port
from training.serve import wait_for

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(lacking()) and "CI" not in os.environ, reason=f"images need {', '.join(lacking())}"),
]
MB = 1e6


@pytest.fixture(scope="module")
def inference() -> str:
    return build("inference")


@pytest.fixture(scope="module")
def training() -> str:
    return build("training-cpu")


def size_bytes(folder: Path) -> int:
    """Of all files, hard links counted once."""
    files = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            files[status.st_ino] = status.st_size
    return sum(files.values())


def names(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in folder.glob("opt/venv/lib/python3*/site-packages/*")}


def test_inference_is_small_and_holds_no_torch(inference: str) -> None:
    with rootfs(inference) as root, rootfs(base()) as below:
        over = size_bytes(root) - size_bytes(below)
        assert over <= 400 * MB, f"{over / MB:.0f} MB"
        assert not names(root) & {"torch", "mlflow", "dvc", "pip", "pytest"}
        assert not (root / "app" / "training").exists()


@pytest.mark.parametrize("target", ["inference", "training"])
def test_nothing_is_inside_that_only_a_build_needs(target: str, request: pytest.FixtureRequest) -> None:
    with rootfs(request.getfixturevalue(target)) as root:
        programs = {
            path.name for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in root.glob(f"{folder}/*")
        }
        assert not programs & {"gcc", "cc", "g++", "make", "pip", "pip3"}
        assert not (root / "root" / ".cache").exists()
        assert not list((root / "wheels").glob("*")) if (root / "wheels").exists() else True
        assert not (root / "app" / "tests").exists()
        [packages] = root.glob("opt/venv/lib/python3*/site-packages")
        assert not [
            str(path.relative_to(packages)) for path in packages.rglob("test*") if path.name in ("test", "tests")
        ]
        left = {path.name for path in packages.glob("torch/bin/*") if path.is_file() and path.stat().st_mode & 0o111}
        assert left <= {"torch_shm_manager"}
        # What a change of the code makes anew is the last folder copied, /app.
        assert size_bytes(root / "app") < 5 * MB


def test_training_cpu_is_refused_without_a_named_torch() -> None:
    """The locked one is for CUDA: gigabytes under a name that denies them."""
    given = ["--build-arg", f"BASE={base()}", "--build-arg", "PIP_NO_INDEX=1"]
    options = ["--quiet", "--layers", "--isolation", "chroot", "--target", "training-cpu"]
    with alone(), pytest.raises(RuntimeError, match="name a CPU build: --build-arg TORCH="):
        buildah("bud", *options, *given, str(ROOT))


@pytest.mark.parametrize("target", ["inference", "training"])
def test_an_image_tells_what_it_is_and_runs_as_nobody(target: str, request: pytest.FixtureRequest) -> None:
    config = configuration(request.getfixturevalue(target))
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.revision"] == "test"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_a_change_of_the_code_is_small_layers_over_the_same_packages(inference: str, tmp_path: Path) -> None:
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    with (tmp_path / "services" / "inference" / "app.py").open("a") as file:
        file.write("# changed\n")
    changed = build("inference", tmp_path)
    new = set(layers(changed)) - set(layers(inference))
    sizes = [layers(changed)[one] for one in new]
    print(f"{sum(sizes) / MB:.2f} MB of {sum(layers(changed).values()) / MB:.0f} MB are new")
    assert 0 < sum(sizes) < 5 * MB
    buildah("rmi", changed)


def layers(image: str) -> dict[str, int]:
    """Digest of each layer → its bytes, unpacked."""
    digests = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["rootfs"]["diff_ids"]
    [kept] = Path(storage()[1]).glob("*-layers/layers.json")
    known = {one["diff-digest"]: one["diff-size"] for one in json.loads(kept.read_text()) if "diff-digest" in one}
    return {digest: known[digest] for digest in digests}


def test_a_golden_request_is_answered_read_only_and_sigterm_ends_the_service(inference: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "lamps.onnx").write_bytes(export())
    models.chmod(0o755)
    port = free_port()
    environment = [f"BIT_SERVE_PORT={port}", "BIT_SERVE_MODELS=/models"]
    with container(inference, tmp_path / "run", mounts={models: "/models"}, environment=environment) as running:
        wait_for(f"http://127.0.0.1:{port}/v2/health/ready", 60, tmp_path / "run" / "log")
        for value, expected in ((10, "dark"), (250, "bright")):
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/lamps/classify", content=gray_png(value), timeout=30)
            assert answer.json()["predictions"][0]["class"] == expected
        how, *health = configuration(inference)["Healthcheck"]["Test"]
        assert how == "CMD"
        assert execute(tmp_path / "run", health) == 0
        assert execute(tmp_path / "run", [word.replace("health/live", "health/nowhere") for word in health]) != 0
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=40) == 0
    assert "Read-only" not in (tmp_path / "run" / "log").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with upstream pictures, to be mounted."""
    folder = tmp_path / "project"
    draw_folder(folder / "data" / "upstream")
    shutil.copy(ROOT / "params.yaml", folder)
    return folder


def pretrain(steps: int) -> str:
    """The shell's words for a training of two ranks, after packing."""
    values = {"steps": steps, "warmup_steps": 1, "decays": "[0.6]", "global_batch": 8}
    given = " ".join(f"--set pretrain.{key}={value}" for key, value in values.items())
    ready = "cp -r /project /tmp/p && cd /tmp/p && python3 -m training pack"
    return f"{ready} && exec torchrun --nproc-per-node 2 -m training pretrain {given}"


def test_five_steps_of_training_by_torchrun_read_only(training: str, project: Path, tmp_path: Path) -> None:
    script = pretrain(5).replace("exec ", "") + " && cat runs/pretrain/receipt.json"
    with container(training, tmp_path / "run", "sh", "-c", script, mounts={project: "/project"}) as running:
        status = running.wait(timeout=400)  # 20 s on quiet cores
    said = (tmp_path / "run" / "log").read_text()
    assert status == 0, said[-3000:]
    assert "upstream 5/5" in said
    assert json.loads(said[said.rindex("\n{") :])["stage"] == "pretrain"


def test_sigterm_to_torchrun_as_process_1_writes_a_checkpoint(training: str, project: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "log"
    script = pretrain(100_000)
    with container(training, tmp_path / "run", "sh", "-c", script, mounts={project: "/project"}) as running:
        wait_until(lambda: "upstream 50/" in log.read_text() or running.poll() is not None)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=40) != 0
    assert re.search(r"stopped by SIGTERM after step \d+, .* was written, start again to go on", log.read_text())


def test_the_context_of_a_build_holds_what_is_copied_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    arguments = ["--quiet", "--isolation", "chroot", "--ignorefile", str(ROOT / ".dockerignore")]
    image = "localhost/bit-context:test"
    with alone():
        buildah("bud", *arguments, "--file", str(tmp_path / "Dockerfile"), "--tag", image, str(ROOT))
    with rootfs(image) as root:
        top = {path.name for path in root.iterdir()}
        assert top == {"docker", "pyproject.toml", "README.md", "LICENSE", "services", "training"}
        assert not list(root.rglob("__pycache__"))
        assert size_bytes(root) < 5 * MB
    buildah("rmi", image)
