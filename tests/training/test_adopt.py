"""`upstream.weights`: the stage `pretrain` adopts published weights, of any layout, instead of training."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.training.models.test_npz import network
from training import pretrain, receipt
from training.config import Config
from training.models import exchange, npz
from training.models.npz import WeightsError


def test_published_weights_are_adopted_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    npz.save(network(), "big.npz", "big_vision")
    npz.save(network(), "plain.npz")
    exchange.convert(Path("plain.npz"), Path("timm.pth"), "R14x0.5")
    digest = hashlib.sha256(Path("big.npz").read_bytes()).hexdigest()

    def config(weights: str, sha256: str | None = None, arch: str = "R14x0.5") -> Config:
        upstream = {"arch": arch, "weights": weights, "sha256": sha256}
        return Config.model_validate({"upstream": upstream, "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})

    for source in ("big.npz", "timm.pth"):
        pretrain.main(config(source))
        with np.load("plain.npz") as expected, np.load("runs/pretrain/weights.npz") as adopted:
            assert adopted.files == expected.files
            assert all(np.array_equal(adopted[key], expected[key]) for key in adopted.files)
        made = receipt.read("pretrain")
        assert made.metrics == {"parameters": sum(p.numel() for p in network().parameters())}
        assert f"has sha256 {made.inputs['weights']}; pin it" in capsys.readouterr().out
    pretrain.main(config("big.npz", digest))
    assert "pin it" not in capsys.readouterr().out
    for bad in (config("big.npz", "0" * 64), config("plain.npz", arch="R50x1")):
        with pytest.raises(WeightsError, match=f"{digest}, expected 0000|The file is of arch R14x0.5"):
            pretrain.main(bad)
    assert receipt.read("pretrain").inputs["weights"] == digest  # a refused file changes nothing
    assert not list(Path("runs/pretrain").glob("published*"))
