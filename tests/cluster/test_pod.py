"""What a stage does inside a pod: files from a mounted ConfigMap, last words of an error."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import ROOT
from tests.conftest import draw_folder
from tests.e2e.test_pipeline import PARAMS


@pytest.fixture
def pod(tmp_path: Path) -> dict[str, str]:
    """The environment of a pod, with a ConfigMap mounted as a kubelet mounts it: links into a folder of links."""
    made = tmp_path / "etc" / "..2026_11_25"
    (made / "runs" / "pack" / "upstream").mkdir(parents=True)
    (made / "params.yaml").write_text("pretrain:\n  stesp: 1\n")
    (made / "runs" / "pack" / "upstream" / "receipt.json").write_text("{}")
    (tmp_path / "etc" / "..data").symlink_to(made.name)
    for name in ("params.yaml", "runs"):
        (tmp_path / "etc" / name).symlink_to(Path("..data", name))
    (tmp_path / "work").mkdir()
    return {
        "BIT_JOB": "bit-pretrain-1",
        "BIT_STORE": f"file://{tmp_path}/store",
        "BIT_PROJECT": str(tmp_path / "etc"),
        "BIT_TERMINATION_LOG": str(tmp_path / "termination"),
        "PYTHONPATH": str(ROOT),
    }


def run(folder: Path, given: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=os.environ | given, capture_output=True, text=True, timeout=120, check=False
    )


def test_an_error_ends_torchrun_at_once_with_its_own_words(pod: dict[str, str], tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    done = run(tmp_path / "work", pod | {"PET_MAX_RESTARTS": "100"}, torchrun, "-m", "training", "pretrain")
    assert done.returncode == 1
    assert done.stderr.count("did you mean 'steps'") == 1  # not a hundred times
    words = "pretrain.stesp is not a key of params.yaml: did you mean 'steps'"
    assert (tmp_path / "termination").read_text().startswith(words)
    assert (tmp_path / "store" / "error.txt").read_text().startswith(words)
    assert (tmp_path / "work" / "params.yaml").is_file()
    assert (tmp_path / "work" / "runs" / "pack" / "upstream" / "receipt.json").is_file()


def test_a_program_error_leaves_its_traceback(pod: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "etc" / "..data" / "params.yaml").write_text("{}")
    done = run(tmp_path / "work", pod, sys.executable, "-m", "training", "pretrain")  # its receipt lacks every key
    assert done.returncode == 1
    assert "ValidationError" in (tmp_path / "termination").read_text()


def test_a_store_that_does_not_answer_takes_nothing_from_the_error(pod: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    done = run(tmp_path / "work", pod, sys.executable, "-m", "training", "pretrain")
    assert done.returncode == 2
    assert "did you mean 'steps'" in done.stderr
    assert "does not take the error" in done.stderr
    assert (tmp_path / "termination").is_file()


def test_checkpoints_stay_until_the_result_has_arrived_and_what_has_ended_is_not_run_again(
    pod: dict[str, str], tmp_path: Path
) -> None:
    home, work, mounted, store = tmp_path / "home", tmp_path / "work", tmp_path / "etc" / "..data", tmp_path / "store"
    draw_folder(home / "data" / "upstream")
    given = PARAMS | {"tracking_uri": f"sqlite:///{home}/mlflow.db"}
    (home / "params.yaml").write_text(yaml.safe_dump(given))
    assert run(home, {"PYTHONPATH": str(ROOT)}, sys.executable, "-m", "training", "pack").returncode == 0
    packed = (home / "runs" / "pack" / "upstream" / "receipt.json").read_text().replace('"runs/', f'"{home}/runs/')
    (mounted / "runs" / "pack" / "upstream" / "receipt.json").write_text(packed)
    (mounted / "params.yaml").write_text((home / "params.yaml").read_text())
    pretrain = (work, pod, sys.executable, "-m", "training", "pretrain")

    store.write_text("not a folder")
    assert run(*pretrain).returncode == 1
    assert (work / ".checkpoints" / "upstream" / "step-00000006" / "meta.json").is_file()
    store.unlink()
    again = run(*pretrain)
    assert again.returncode == 0, again.stderr
    assert "resumed after step 6" in again.stdout + again.stderr
    assert not (work / ".checkpoints" / "upstream").exists()

    receipt, termination = store / "receipt.json", tmp_path / "termination"
    made = receipt.read_bytes()
    termination.unlink()
    late = run(*pretrain)
    assert late.returncode == 0
    assert "has ended well before" in late.stdout
    assert receipt.read_bytes() == made
    assert json.loads(termination.read_text())["sha256"] == hashlib.sha256(made).hexdigest()
    (mounted / "params.yaml").write_text(yaml.safe_dump(given | {"pretrain": given["pretrain"] | {"seed": 1}}))
    assert run(*pretrain).returncode == 0
    assert receipt.read_bytes() != made
