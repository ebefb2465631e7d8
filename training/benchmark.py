"""`bit benchmark`: transfer measured by the paper's protocols → tidy results, plots, a Markdown table.

    bit benchmark --suite demo

Every figure is the median ± standard deviation over the seeds. Runs that results.parquet holds, with the same upstream weights,
configuration and examples, are not repeated; an interrupted one continues from its checkpoint.
"""

import contextlib
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

from training import tracking
from training.config import Config
from training.engine import distributed
from training.study import draws, report, suites, upstreams
from training.study.datasets import DATASETS, opened
from training.study.measure import Bench
from training.study.results import KEY, Results, Row, claimed, key_of

OUT = Path("runs/benchmark")
EXPERIMENT = "benchmark"


def main(config: Config, name: str, out: Path = OUT) -> None:
    """Runs what is left of a suite, then writes its tables and plots. Raises ConfigError for an unknown suite or absent data."""
    suite, root = suites.chosen(name, config), Path(config.benchmark.root)
    wanted = {dataset: DATASETS[dataset] for dataset in suite.datasets}
    tuned_on = {row.tuned_on for row in wanted.values() if suite.protocol == "out-of-distribution" and row.tuned_on}
    data = {dataset: opened(dataset, root) for dataset in sorted(tuned_on | set(wanted))}
    most = {dataset: draws.most_shots(data[dataset]) for dataset in suite.datasets}
    units = [unit for unit in suites.units(suite, config) if not unit.shots or unit.shots <= most[unit.dataset]]
    folder, work = out / name, out / "upstreams"
    work.mkdir(parents=True, exist_ok=True)
    with claimed(folder), contextlib.ExitStack() as stack:

        @cache
        def parent() -> tracking.Run:
            """Begun by the first thing that is left to do."""
            params = {"suite": name, "benchmark": config.benchmark.model_dump(exclude={"published"})}
            run = tracking.start(config.tracking_uri, "benchmark", None, params, {}, experiment=EXPERIMENT, name=name)
            return stack.enter_context(run)

        world = stack.enter_context(distributed.join(config.finetune.timeout_s))
        bench, results = Bench(config, suite, data, work, world), Results(folder)
        starts: dict[suites.Upstream, upstreams.Start] = {}
        current = []
        for number, unit in enumerate(units, 1):
            if unit.upstream not in starts:
                starts[unit.upstream] = upstreams.ready(unit.upstream, suite, config, work, world)
            start = starts[unit.upstream]
            key = key_of(unit, DATASETS[unit.dataset].group, start.sha256, *bench.hashes(unit))
            if key not in results.rows:
                told = dict(zip(KEY, key, strict=True))
                tags = {"mlflow.parentRunId": parent().run_id}
                run_name = f"{unit.dataset} {unit.method} {unit.upstream.label} {unit.shots} {unit.seed}"
                with tracking.start(
                    config.tracking_uri, "benchmark", None, told, tags, experiment=EXPERIMENT, name=run_name
                ) as run:
                    measured = bench.measure(unit, start)
                    run.metrics({name: value for name, value in asdict(measured).items() if value is not None})
                results.add(Row(**told, **asdict(measured), run_id=run.run_id))
                print(f"{number} of {len(units)} {run_name}: {measured.accuracy:.1%}", file=sys.stderr)
            current.append(results.rows[key])
        made = report.write(suite, current, config, starts, most, folder)
        if parent.cache_info().currsize:
            for file in (results.csv, results.parquet, *made):
                parent().artifact(file)
    print((folder / "table.md").read_text())
