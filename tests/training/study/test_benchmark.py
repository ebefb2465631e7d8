"""`bit benchmark` end to end on small data: real MLflow server, real files, a real kill; every protocol, table and plot."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from tests.conftest import draw_folder
from tests.services.running import mlflow_server
from tests.training.study import layouts
from training import benchmark, pack
from training.config import Config, ConfigError
from training.params import load
from training.study import report, suites
from training.study.results import Results, claimed

SMALL = {
    "upstream": {"arch": "R14x0.5"},
    "pretrain": {"steps": 4, "global_batch": 8, "warmup_steps": 1, "resize": 24, "crop": 24},
    "finetune": {"steps": 2, "global_batch": 8, "resize": 24, "crop": 24},
    "benchmark": {
        "datasets": ["textures"],
        "shots": [1, 2],
        "shares": [0.5, 1.0],
        "methods": ["ridge", "finetune"],
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with packed upstream pictures, whose MLflow is a server; the current folder while its tests run."""
    root, before, threads = tmp_path_factory.mktemp("benchmark"), Path.cwd(), torch.get_num_threads()
    draw_folder(root / "data" / "upstream", classes=4, train=10, test=2)
    os.chdir(root)
    torch.set_num_threads(1)  # small layers: beside other work a second thread is waited for longer than it helps
    with mlflow_server(root) as uri:
        (root / "params.yaml").write_text(yaml.safe_dump(SMALL | {"tracking_uri": uri}))
        pack.main(load())
        yield root
    torch.set_num_threads(threads)
    os.chdir(before)


def config(**keys: object) -> Config:
    return load(overrides=[f"{key.replace('__', '.')}={value}" for key, value in keys.items()])


def runs(config: Config, parent: str | None = None) -> list[Run]:
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name("benchmark")
    wanted = f"tags.`mlflow.parentRunId` = '{parent}'" if parent else ""
    return list(client.search_runs([experiment.experiment_id], wanted, max_results=1000)) if experiment else []


def rows(suite: str) -> list[dict]:
    return pq.read_table(Path("runs/benchmark", suite, "results.parquet")).to_pylist()


def is_drawn(path: Path) -> bool:
    with Image.open(path) as image:
        return image.width > 300 and all(low != high for low, high in image.convert("RGB").getextrema())


def test_a_killed_benchmark_goes_on_where_it_stopped(project: Path) -> None:
    """Then: tables, plots, tidy files, parent and child runs; and a second call that has nothing to do."""
    told, settings = project / "runs/benchmark/demo/results.csv", config()
    environment = os.environ | {"PYTHONPATH": str(Path(benchmark.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "training", "benchmark", "--suite", "demo"], env=environment, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 400
    while not (told.is_file() and len(told.read_text().splitlines()) > 2):
        assert child.poll() is None, child.stderr.read().decode() if child.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = {row["run_id"]: row["accuracy"] for row in rows("demo")}

    benchmark.main(settings, "demo")
    after = rows("demo")
    assert len(after) == 2 * 2 * 2 * 3  # upstreams, shots, methods, seeds
    assert before.items() <= {row["run_id"]: row["accuracy"] for row in after}.items()
    assert {row["upstream"] for row in after} == {"0.5 of upstream", "upstream"}
    assert len({row["upstream_sha256"] for row in after}) == 2
    assert len(told.read_text().splitlines()) == 25

    children = [run for run in runs(settings) if "mlflow.parentRunId" in run.data.tags]
    parents = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert len(parents) == 2
    figures = {run.info.run_id: run.data.metrics["accuracy"] for run in children if run.info.status == "FINISHED"}
    assert {row["run_id"]: pytest.approx(row["accuracy"]) for row in after}.items() <= figures.items()
    finished = [
        parent for parent in parents if MlflowClient(settings.tracking_uri).get_run(parent).info.status == "FINISHED"
    ]
    assert len(finished) == 1
    artifacts = {item.path for item in MlflowClient(settings.tracking_uri).list_artifacts(finished[0])}
    assert artifacts == {"results.csv", "results.parquet", "table.md", "by_shots.png", "by_upstream.png"}

    table = (project / "runs/benchmark/demo/table.md").read_text()
    assert "| dataset | method | upstream | 1 per class | 2 per class |" in table
    assert "| textures | fine-tuning | R14x0.5, upstream |" in table
    assert "What differs from the paper:" in table
    assert "R14x0.5 0.5 of upstream (20 pictures)" in table
    for name in ("by_shots.png", "by_upstream.png"):
        assert is_drawn(project / "runs/benchmark/demo" / name)

    count = len(runs(settings))
    benchmark.main(settings, "demo")
    assert len(runs(settings)) == count
    assert rows("demo") == after


def test_another_upstream_or_another_rule_is_measured_anew(project: Path) -> None:
    quick = {"benchmark__shots": [1], "benchmark__shares": [1.0], "benchmark__methods": ["ridge"]}
    benchmark.main(config(**quick), "few-shot")
    first = rows("few-shot")
    benchmark.main(config(**quick, pretrain__seed=5), "few-shot")
    second = rows("few-shot")
    assert (len(first), len(second)) == (3, 6)  # old rows stay in the file
    assert len({row["upstream_sha256"] for row in second}) == 2
    table = Path("runs/benchmark/few-shot/table.md").read_text()
    benchmark.main(config(**quick, pretrain__seed=5, benchmark__l2=1.0, finetune__evaluate_every=7), "few-shot")
    third = rows("few-shot")
    assert len(third) == 9
    assert {row["data_hash"] for row in third} == {row["data_hash"] for row in first}
    benchmark.main(config(**quick, pretrain__seed=5), "few-shot")
    assert len(rows("few-shot")) == 9
    assert Path("runs/benchmark/few-shot/table.md").read_text() == table  # of the current rows alone


def test_vtab_trains_on_800_and_validates_on_200(project: Path) -> None:
    layouts.svhn(project / "data/benchmark/svhn", train=1000, test=20)
    layouts.dsprites(project / "data/benchmark/dsprites", 1300)
    datasets = {
        "benchmark__datasets": ["svhn", "dsprites-location"],
        "benchmark__shots": "null",
        "benchmark__shares": [1.0],
    }
    benchmark.main(config(**datasets, finetune__steps=1), "vtab")
    told = rows("vtab")
    assert len(told) == 2 * 2 * 3
    assert all(row["validation_accuracy"] is not None and row["protocol"] == "vtab-1k" for row in told)
    table = Path("runs/benchmark/vtab/table.md").read_text()
    assert "| network | natural | specialized | structured | mean of the tasks |" in table
    assert "| BiT-L, published |  |  |  | 76.3 |" in table
    assert is_drawn(Path("runs/benchmark/vtab/by_group.png"))
    assert "BiT-M" not in table.partition("What differs")[0]  # published are full transfers
    own = [row for row in told if row["method"] == "ridge"]
    svhn = report.figure([row["accuracy"] for row in own if row["dataset"] == "svhn"])
    accuracy = [sum(row["accuracy"] for row in own if row["seed"] == seed) / 2 for seed in range(3)]
    assert f"| R14x0.5, upstream: ridge regression | {svhn} | — |" in table
    assert str(report.figure(accuracy)) in table


def test_out_of_distribution_asks_the_tuned_network_through_the_mapping(project: Path) -> None:
    layouts.folders(project / "data/benchmark/ilsvrc", 1000)
    layouts.objectnet(project / "data/benchmark/objectnet")
    keys = {"benchmark__datasets": "null", "benchmark__shots": "null", "benchmark__shares": [1.0], "finetune__steps": 1}
    benchmark.main(config(**keys, benchmark__methods=["finetune"]), "ood")
    told = rows("ood")
    assert [(row["protocol"], row["dataset"]) for row in told[:2]] == [
        ("full", "ilsvrc"),
        ("out-of-distribution", "objectnet"),
    ]
    assert len(told) == 6
    assert len(list(Path("runs/benchmark/upstreams").glob("tuned-*.npz"))) == 3  # tuned once for both questions
    table = Path("runs/benchmark/ood/table.md").read_text()
    assert "| dataset | R14x0.5, upstream: fine-tuning | BiT-M R50x1, published |" in table
    assert "80.68" in table
    assert "87.54" in table


def test_label_noise_and_scaling_train_their_own_upstreams(project: Path) -> None:
    quick = {"benchmark__shots": [2], "benchmark__methods": ["ridge"]}
    benchmark.main(config(**quick, benchmark__shares=[1.0], benchmark__noises=[0.0, 0.4]), "noise")
    assert {(row["noise"], row["upstream"]) for row in rows("noise")} == {
        (0.0, "upstream"),
        (0.4, "upstream, 40% wrong labels"),
    }
    assert len({row["upstream_sha256"] for row in rows("noise")}) == 2
    assert (
        "| dataset | method | arch | per class | upstream | upstream, 40% wrong labels |"
        in Path("runs/benchmark/noise/table.md").read_text()
    )
    assert is_drawn(Path("runs/benchmark/noise/by_noise.png"))
    benchmark.main(config(**quick, benchmark__archs=["R14x0.5"], benchmark__shares=[0.5, 1.0]), "scaling")
    assert is_drawn(Path("runs/benchmark/scaling/by_upstream.png"))


def test_published_weights_take_the_place_of_own_upstreams(project: Path) -> None:
    made = next(Path("runs/benchmark/upstreams").glob("upstream-*.npz"))
    row = f"[{{name: BiT-M, arch: R14x0.5, weights: {made.resolve()}, pictures: 14000000}}]"
    keys = {"benchmark__published": row, "benchmark__methods": ["ridge"], "benchmark__shots": "null"}
    benchmark.main(config(**keys), "full")
    assert {(row["upstream"], row["dataset"]) for row in rows("full")} == {("BiT-M", "textures")}
    assert "R14x0.5 BiT-M (14,000,000 pictures)" in Path("runs/benchmark/full/table.md").read_text()


def test_what_cannot_be_measured_is_refused_before_any_work(project: Path) -> None:
    for suite, keys, message in (
        ("dmeo", {}, r"suite='dmeo' is not known. Did you mean 'demo'\? Choices: demo, full, few-shot"),
        ("demo", {"benchmark__datasets": ["textrues"]}, "'textrues' is not a row. Choices: digits"),
        ("ood", {"benchmark__shots": "null"}, "a tuned network is asked: finetune"),
        (
            "ood",
            {"benchmark__shots": "null", "benchmark__methods": ["finetune"]},
            "'textures' maps to no other dataset's classes. Choices: objectnet",
        ),
        ("full", {}, "benchmark.shots: the suite 'full' uses all examples"),
        (
            "few-shot",
            {"benchmark__datasets": ["pets"]},
            r"data/benchmark/pets does not hold pets. Put there what images.tar.gz",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            benchmark.main(config(**keys), suite)
    with pytest.raises(ConfigError, match=r"benchmark.seeds"):
        config(benchmark__seeds=2)
    with (
        claimed(Path("runs/benchmark/demo")),
        pytest.raises(ConfigError, match="being written by another `bit benchmark`"),
    ):
        benchmark.main(config(), "demo")


def test_more_shots_than_a_class_has_are_left_out_and_said(project: Path) -> None:
    keys = {
        "benchmark__shots": [1, 101],
        "benchmark__methods": ["ridge"],
        "benchmark__shares": [1.0],
        "pretrain__seed": 5,
    }
    benchmark.main(config(**keys), "few-shot")
    table = Path("runs/benchmark/few-shot/table.md").read_text()
    assert "| — |" in table
    assert "too few training examples: textures has 100" in table


def test_the_suites_are_the_papers() -> None:
    assert suites.SUITES["few-shot"].shots == (1, 5, 10, 25, 100)
    assert len(suites.SUITES["vtab"].datasets) == 19
    assert (min(suites.SUITES["noise"].noises), max(suites.SUITES["noise"].noises)) == (0.0, 0.4)
    assert len(suites.SUITES["scaling"].archs) * len(suites.SUITES["scaling"].shares) == 15
    assert all(suite.seeds >= 3 for suite in suites.SUITES.values())


def test_results_survive_the_file(tmp_path: Path) -> None:
    assert Results(tmp_path).rows == {}
