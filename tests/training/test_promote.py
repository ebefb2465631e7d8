"""Promotion over a real registry: the replay, the gates, the run that is left, the way back, the history."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.services.exports import export, gray_png
from training import history, pack, predict, promote, tracking
from training.config import Config, ConfigError, PromoteConfig

LIMITS = PromoteConfig(max_latency_ratio=1000)  # timing is a test of its own
ROOT = Path(__file__).parents[2]


class Registry:
    def __init__(self, folder: Path) -> None:
        self.config = Config(tracking_uri=f"sqlite:///{folder}/mlflow.db", promote=LIMITS)
        self.client, self.folder = tracking.connect(self.config.tracking_uri), folder

    def publish(self, data: bytes, validation: str = "passed") -> str:
        """A new version with the alias `challenger`."""
        path = self.folder / tracking.EXPORT
        path.write_bytes(data)
        tags = {"sha256": hashlib.sha256(data).hexdigest(), "validation": validation}
        with tracking.start(self.config.tracking_uri, "register", "lamps", {}, {}) as run:
            run.artifact(path, "export")
            return run.register("lamps", "export", tags)

    @property
    def champion(self) -> str:
        found = tracking.version_at(self.client, "lamps", tracking.CHAMPION)
        return str(found.version) if found else "none"

    def moves(self) -> list[tuple[str, str, str]]:
        """(from, to, how) of the moves, oldest first."""
        entries = history.read(self.client, "lamps")
        return [(entry.before, entry.after, entry.how) for entry in reversed(entries) if entry.moved]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)  # without a packed test split
    return Registry(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for value in range(0, 250, 25):
        (folder / f"{value}.png").write_bytes(gray_png(value))
    return folder


def test_the_first_promotion_needs_no_champion_to_compare_with(registry: Registry) -> None:
    first = registry.publish(export())
    said = promote.main(registry.config, "lamps", why="the first")
    assert said[-1] == f"  alias champion → version {first}"
    assert registry.champion == first
    assert registry.moves() == [("none", first, "bit promote")]
    assert promote.main(registry.config, "lamps")[-1].endswith("nothing to do")


def test_the_first_promotion_asks_the_export_for_its_golden_answers(registry: Registry) -> None:
    registry.publish(export(golden_off=0.2))
    with pytest.raises(ConfigError, match="golden answers are off"):
        promote.main(registry.config, "lamps")
    assert registry.champion == "none"
    assert registry.moves() == []


def test_a_champion_that_somebody_else_moved_meanwhile_is_left_alone(registry: Registry, pictures: Path) -> None:
    first, other, mine = (registry.publish(export(threshold=t)) for t in (0.1, 0.2, 0.3))
    promote.main(registry.config, "lamps", version=int(first))
    slow = pictures / "slow.png"  # a pipe: the replay waits for it, long enough for a colleague
    os.mkfifo(slow)

    def colleague() -> None:
        with slow.open("wb") as pipe:
            registry.client.set_registered_model_alias("lamps", "champion", other)
            pipe.write(gray_png(90))

    thread = threading.Thread(target=colleague)
    thread.start()
    with pytest.raises(promote.GateError, match="moved by somebody else meanwhile: it is version 2"):
        promote.main(registry.config, "lamps", version=int(mine), pictures=pictures)
    thread.join()
    assert registry.champion == other
    assert registry.moves() == [("none", first, history.PROMOTED)]


def test_a_challenger_that_agrees_is_promoted_and_the_run_says_how(registry: Registry, pictures: Path) -> None:
    first, second = registry.publish(export()), "2"
    promote.main(registry.config, "lamps")
    registry.publish(export(threshold=0.5))
    promote.main(registry.config, "lamps", pictures=pictures, why="calibrated")
    assert registry.champion == second
    [entry, *_] = history.read(registry.client, "lamps")
    assert (entry.before, entry.after, entry.why, entry.moved) == (first, second, "calibrated", True)
    assert (entry.figures["agreement"], entry.figures["pictures"]) == (1.0, 10.0)
    assert entry.figures["latency_ratio"] > 0


def test_a_challenger_that_flips_answers_is_held_back_with_the_pictures(registry: Registry, pictures: Path) -> None:
    first = registry.publish(export())
    promote.main(registry.config, "lamps")
    second = registry.publish(export(sign=-1))
    with pytest.raises(promote.GateError, match=r"FAIL  agreement 0\.000 \(at least 0\.75\)[\s\S]*stays at version 1"):
        promote.main(registry.config, "lamps", pictures=pictures)
    assert registry.champion == first
    experiment = registry.client.get_experiment_by_name(history.EXPERIMENT)
    assert experiment is not None
    [held] = registry.client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'")
    assert [file.path for file in registry.client.list_artifacts(held.info.run_id)] == ["flips.png"]
    with pytest.raises(ConfigError, match="--why"):
        promote.main(registry.config, "lamps", force=True)
    promote.main(registry.config, "lamps", pictures=pictures, force=True, why="dark is bright now")
    assert registry.champion == second
    newest = registry.client.search_runs([experiment.experiment_id], max_results=1)[0]
    assert (newest.data.tags["forced"], newest.data.tags["failed_gates"]) == ("True", "agreement")


def test_where_nothing_is_packed_the_golden_pictures_are_asked(registry: Registry) -> None:
    registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(threshold=0.1))
    assert any("the 1 golden pictures" in line for line in promote.main(registry.config, "lamps"))


def test_accuracy_and_latency_have_gates() -> None:
    figures = {"agreement": 0.9, "latency_ratio": 1.6, "accuracy.from": 0.9, "accuracy.to": 0.88}
    judged = {gate.name: gate.passed for gate in promote.gates(figures, PromoteConfig())}
    assert judged == {"agreement": True, "accuracy_drop": False, "latency_ratio": False}
    figures |= {"latency_ratio": 1.5, "accuracy.to": 0.895}
    assert all(gate.passed for gate in promote.gates(figures, PromoteConfig()))
    figures |= {
        "accuracy.from": 0.95,
        "accuracy.to": 0.94,
    }  # their difference is a trifle over .01, as numbers of 64 bits
    assert all(gate.passed for gate in promote.gates(figures, PromoteConfig(max_accuracy_drop=0.01)))


def test_a_slower_challenger_shows_in_the_latency(registry: Registry, pictures: Path) -> None:
    registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(mflop=100))
    config = registry.config.model_copy(update={"promote": PromoteConfig()})
    with pytest.raises(promote.GateError, match="FAIL  latency_ratio"):
        promote.main(config, "lamps", pictures=pictures)


def test_rolling_back_walks_the_versions_that_were_champion(registry: Registry) -> None:
    for threshold in (0.1, 0.2, 0.3):
        registry.publish(export(threshold=threshold))
        promote.main(registry.config, "lamps")
    assert registry.champion == "3"
    for expected in ("2", "1"):
        promote.rollback(registry.config, "lamps", "worse in the field")
        assert registry.champion == expected
    with pytest.raises(ConfigError, match=r"replaced no other[\s\S]*--version"):
        promote.rollback(registry.config, "lamps")
    assert registry.moves()[-1] == ("2", "1", "bit promote --rollback")


def test_a_move_by_hand_is_noticed_and_rolled_back(registry: Registry) -> None:
    first, second = registry.publish(export()), registry.publish(export(threshold=0.2))
    promote.main(registry.config, "lamps", version=int(first))
    registry.client.set_registered_model_alias("lamps", "champion", second)
    promote.rollback(registry.config, "lamps")
    assert registry.champion == first
    assert [how for *_, how in registry.moves()] == ["bit promote", "alias moved by hand", "bit promote --rollback"]


def test_a_promotion_that_was_killed_before_the_alias_moved_is_none(registry: Registry) -> None:
    first, second = registry.publish(export()), registry.publish(export(threshold=0.2))
    promote.main(registry.config, "lamps", version=int(first))
    uri, told = registry.config.tracking_uri, {"from": first, "to": second, "why": ""}
    killed = history.record(uri, registry.client, "lamps", told, history.PROMOTED)
    killed.__enter__()  # and its process is gone: the run stays as it is
    assert registry.moves() == [("none", first, history.PROMOTED)]
    history.notice(uri, registry.client, "lamps", registry.champion)
    assert registry.moves() == [("none", first, history.PROMOTED)], "nobody moved it back by hand"
    registry.client.set_registered_model_alias("lamps", "champion", second)  # killed a moment later: it had moved
    assert registry.moves()[-1] == (first, second, history.PROMOTED)


def test_the_packed_test_split_tells_the_accuracies(registry: Registry) -> None:
    for split in ("train", "test"):
        for name, values in {"dark": (10, 40, 70), "bright": (180, 210, 240)}.items():
            folder = registry.folder / "tenants" / "lamps" / "pictures" / split / name
            folder.mkdir(parents=True)
            for value in values:
                (folder / f"{value}.png").write_bytes(gray_png(value + (split == "test")))
    wrong = registry.folder / "tenants" / "lamps" / "pictures" / "test" / "dark" / "wrong.png"
    wrong.write_bytes(gray_png(250))  # labelled dark, and bright: neither version gets it right
    pack.main(registry.config, "lamps")
    registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(threshold=0.1))
    assert any("asked both with 7 of the 7 test pictures" in line for line in promote.main(registry.config, "lamps"))
    [entry, _] = history.read(registry.client, "lamps")
    assert entry.figures["pictures"] == 7
    assert entry.figures["accuracy.from"] == entry.figures["accuracy.to"] == pytest.approx(6 / 7)
    registry.publish(export(sign=-1))
    with pytest.raises(promote.GateError, match=r"FAIL  accuracy_drop 0\.714"):
        promote.main(registry.config, "lamps")


def test_an_export_that_was_changed_is_not_promoted(registry: Registry) -> None:
    registry.publish(export())
    promote.main(registry.config, "lamps")
    made = registry.client.get_model_version("lamps", registry.publish(export(sign=-1)))
    assert made.source is not None
    (Path(made.source.removeprefix("file://")) / tracking.EXPORT).write_bytes(export())
    with pytest.raises(ConfigError, match="changed or damaged"):
        promote.main(registry.config, "lamps")


def test_a_version_that_nobody_checked_is_refused(registry: Registry) -> None:
    registry.publish(export(), validation="none")
    with pytest.raises(ConfigError, match="validation=passed"):
        promote.main(registry.config, "lamps")


def test_batch_answers_come_from_the_registry(registry: Registry) -> None:
    first = registry.publish(export())
    with pytest.raises(ConfigError, match=r"no version with the alias 'champion'\. Versions: 1\."):
        predict.find_export(registry.config, "lamps", None, "champion")
    promote.main(registry.config, "lamps")
    assert predict.find_export(registry.config, "lamps", None, "champion") == predict.Export(export(), first)
    assert predict.find_export(registry.config, "lamps", 1, "champion").version == first
    shared = {"out": str(registry.folder / "answers.parquet"), "run": "job-1"}
    assert predict.find_export(registry.config, "lamps", None, "champion", **shared).version == first
    second = registry.publish(export(threshold=0.1))
    promote.main(registry.config, "lamps")
    assert predict.find_export(registry.config, "lamps", None, "champion", **shared).version == first, "of one run"
    assert predict.find_export(registry.config, "lamps", None, "champion").version == second


def test_the_command_prints_the_history(registry: Registry) -> None:
    registry.publish(export())
    promote.main(registry.config, "lamps", why="because")
    (registry.folder / "params.yaml").write_text(f"tracking_uri: {registry.config.tracking_uri}\n")
    command = [sys.executable, "-m", "training", "promote", "lamps", "--history"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=registry.folder, env=environment)
    assert all(text in done.stdout for text in ("none", "because", "bit promote"))


def test_a_picture_that_cannot_be_read_is_named_and_a_folder_is_none(registry: Registry, pictures: Path) -> None:
    first = registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(threshold=0.1))
    (pictures / "dir.png").mkdir()
    for name, data in {"broken.png": b"not a picture", "empty.jpg": b""}.items():
        (pictures / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{pictures / name} cannot be asked about: [\s\S]*not a picture"):
            promote.main(registry.config, "lamps", pictures=pictures)
        (pictures / name).unlink()
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    with pytest.raises(ConfigError, match=r"gone\.png cannot be asked about: [\s\S]*No such file"):
        promote.main(registry.config, "lamps", pictures=pictures)
    (pictures / "gone.png").unlink()
    assert registry.champion == first
    promote.main(registry.config, "lamps", pictures=pictures)
    assert registry.champion == "2"


def label(pictures: Path, places: Sequence[str]) -> None:
    """Moves the pictures, from the darkest on, into folders."""
    for path, place in zip(sorted(pictures.glob("*.png"), key=lambda path: int(path.stem)), places, strict=True):
        (pictures / place).mkdir(parents=True, exist_ok=True)
        path.rename(pictures / place / path.name)


@pytest.mark.parametrize(
    ("places", "accuracy"),
    [
        (["dark"] * 6 + ["bright"] * 4, 1.0),
        (["test/dark"] * 6 + ["test/bright/lab"] * 4, 1.0),
        (["bright"] + ["dark"] * 5 + ["bright"] * 4, 0.9),
        (["dark"] * 6 + ["."] * 4, None),
        (["dark"] * 6 + ["dim"] * 4, None),
    ],
    ids=["classes", "split", "wrong", "flat", "unknown"],
)
def test_folders_named_like_classes_tell_the_accuracies(
    registry: Registry, pictures: Path, places: list[str], accuracy: float | None
) -> None:
    label(pictures, places)
    registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(threshold=0.1))
    said = promote.main(registry.config, "lamps", pictures=pictures)
    [entry, _] = history.read(registry.client, "lamps")
    assert entry.figures.get("accuracy.from") == entry.figures.get("accuracy.to") == accuracy
    assert any("labelled by their folders" in line for line in said) == (accuracy is not None)


def test_a_challenger_that_is_wrong_about_labelled_folders_is_held_back(registry: Registry, pictures: Path) -> None:
    label(pictures, ["dark"] * 6 + ["bright"] * 4)
    registry.publish(export())
    promote.main(registry.config, "lamps")
    registry.publish(export(sign=-1))
    with pytest.raises(promote.GateError, match=r"FAIL  accuracy_drop 1\.000"):
        promote.main(registry.config, "lamps", pictures=pictures)


@pytest.mark.parametrize("name", ["o'brien", 'the "best"'])
def test_a_tenant_whose_name_holds_quotes_has_a_history(registry: Registry, name: str) -> None:
    told = {"from": "none", "to": "1", "why": "because"}
    with history.record(registry.config.tracking_uri, registry.client, name, told, history.PROMOTED):
        pass
    assert [entry.why for entry in history.read(registry.client, name)] == ["because"]
    assert history.read(registry.client, "lamps") == []
    assert tracking.versions(registry.client, name) == []


def test_a_name_with_both_quotes_is_refused(registry: Registry) -> None:
    with pytest.raises(tracking.TrackingError, match="both kinds of quotes"):
        tracking.versions(registry.client, "o'brien's \"best\"")


def test_the_command_ends_with_status_1_and_one_line_where_mlflow_is_away(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("tracking_uri: http://127.0.0.1:9\n")
    command = [sys.executable, "-m", "training", "promote", "lamps"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("bit: MLflow (http://127.0.0.1:9) does not answer: ")
    assert "Start the same command again" in line
