"""Packing in parts: the merged dataset holds what a single `bit pack` holds."""

from pathlib import Path

import pytest

from tests.conftest import draw_folder
from training import parts, receipt
from training.config import Config, ConfigError, PackConfig
from training.data.dataset import Dataset
from training.pack import pack


@pytest.mark.parametrize("count", [1, 3, 7])
def test_parts_joined_are_the_whole(tmp_path: Path, count: int) -> None:
    source = draw_folder(tmp_path / "pictures")
    (source / "train" / "class-0" / "broken.png").write_bytes(b"not a picture")
    stage = PackConfig(shard_bytes=20_000)
    whole, failed = pack(source, tmp_path / "whole", stage, processes=1)
    for number in range(count):
        pack(source, tmp_path / "out.parts" / f"{number:05d}", stage, processes=1, part=(number, count))
    joined, failed_too = parts.join(tmp_path / "out", count)
    assert failed_too == failed
    for key in ("classes", "multi_label", "sizes", "pack"):
        assert joined[key] == whole[key]
    one, other = Dataset.open(tmp_path / "whole"), Dataset.open(tmp_path / "out")
    for split in one.splits:
        assert joined["splits"][split]["class_counts"] == whole["splits"][split]["class_counts"]
        assert one.split(split).keys == other.split(split).keys
        assert one.split(split).labels == other.split(split).labels
        assert list(one.split(split)) == list(other.split(split))


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    pack(draw_folder(tmp_path / "pictures"), tmp_path / "out.parts" / "00000", PackConfig(), processes=1, part=(0, 2))
    with pytest.raises(ConfigError, match="lacks the parts 00001 of 2"):
        parts.join(tmp_path / "out", 2)


def test_the_last_machine_may_fail_before_its_receipt_and_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "data" / "upstream")
    config = Config()
    for number in range(2):
        parts.write(config, None, (number, 2))
    (tmp_path / "full").write_text("no folder")
    with pytest.raises(OSError, match="full"):
        parts.merge(config, None, 2, push=f"file://{tmp_path}/full")
    parts.write(config, None, (1, 2))  # as the pod does that is made anew
    parts.merge(config, None, 2, push=f"file://{tmp_path}/remote")
    made = receipt.read("pack").outputs["dataset"]
    pushed, here = Dataset.open(made.uri), Dataset.open("runs/pack/upstream")
    assert made.uri.startswith(f"file://{tmp_path}/remote/files/md5/")
    assert list(pushed.split("train")) == list(here.split("train"))
    assert not (tmp_path / "runs/pack/upstream.parts").exists()


@pytest.mark.parametrize("text", ["3", "3/3", "a/b", "-1/2"])
def test_a_part_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="0 to COUNT - 1"):
        parts.parse(text)
