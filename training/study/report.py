"""Tables and plots of a suite: medians ± standard deviations, in the paper's layout, beside its published figures."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from training import finetune
from training.config import Config
from training.hyperrule import PRESETS
from training.study import curves
from training.study.published import PUBLISHED, VTAB_MEAN
from training.study.results import Row
from training.study.suites import Suite, Upstream
from training.study.upstreams import Start

GROUPS = ("natural", "specialized", "structured")


class Figure(NamedTuple):
    """Median and standard deviation over the seeds, and how many there were."""

    median: float
    deviation: float
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.median:.1f} ± {100 * self.deviation:.1f}"


def figure(values: Sequence[float]) -> Figure:
    return Figure(statistics.median(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def write(
    suite: Suite,
    rows: Sequence[Row],
    config: Config,
    starts: Mapping[Upstream, Start],
    most: Mapping[str, int],
    folder: Path,
) -> list[Path]:
    """table.md and the plots; returns their paths."""
    columns = {"shots": by_shots, "share": by_upstream, "noise": by_upstream, "dataset": by_dataset}[suite.axis]
    title = f"Test accuracy in percent, median ± standard deviation of {suite.seeds} seeds: {suite.about}."
    parts = [title, *columns(suite, rows, starts), differences(suite, rows, config, starts, most)]
    table = folder / "table.md"
    table.write_text("\n\n".join(parts) + "\n")
    return [table, *curves.draw(suite, rows, pictures(starts), folder)]


def pictures(starts: Mapping[Upstream, Start]) -> dict[tuple[str, str], int]:
    """(arch, label) of an upstream → pictures that it was trained on, where that is known."""
    return {(up.arch, up.label): start.pictures for up, start in starts.items() if start.pictures is not None}


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[object, ...], Figure]:
    """Figures of the rows that agree in the named columns, in the order in which they come."""
    found: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), []).append(row.accuracy)
    return {key: figure(values) for key, values in found.items()}


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def by_shots(suite: Suite, rows: Sequence[Row], starts: Mapping[Upstream, Start]) -> list[str]:
    """A line per dataset, method and upstream, a column per number of examples per class."""
    told = grouped(rows, "dataset", "method", "arch", "upstream", "shots")
    lines = []
    for dataset, method, arch, upstream in sorted({key[:4] for key in told}, key=_order(suite, starts)):
        cells = [str(told.get((dataset, method, arch, upstream, shots), "—")) for shots in suite.shots]
        lines.append([str(dataset), curves.NAMES[str(method)], f"{arch}, {upstream}", *cells])
    return [markdown(["dataset", "method", "upstream", *(f"{n} per class" for n in suite.shots)], lines)]


def by_upstream(suite: Suite, rows: Sequence[Row], starts: Mapping[Upstream, Start]) -> list[str]:
    """A line per dataset, method, architecture and shots, a column per upstream."""
    told = grouped(rows, "dataset", "method", "arch", "shots", "upstream")
    labels = list(dict.fromkeys(up.label for up in starts))
    lines = []
    for dataset, method, arch, shots in dict.fromkeys(key[:4] for key in told):
        cells = [str(told.get((dataset, method, arch, shots, label), "—")) for label in labels]
        lines.append([str(dataset), curves.NAMES[str(method)], str(arch), str(shots or "all"), *cells])
    return [markdown(["dataset", "method", "arch", "per class", *labels], lines)]


def by_dataset(suite: Suite, rows: Sequence[Row], starts: Mapping[Upstream, Start]) -> list[str]:
    """The paper's table 1: a line per dataset, a column per network, then the published ones; for VTAB its groups first."""
    told = grouped(rows, "dataset", "method", "arch", "upstream")
    ours = list(dict.fromkeys(key[1:] for key in told))
    heads = [f"{arch}, {upstream}: {curves.NAMES[str(method)]}" for method, arch, upstream in ours]
    names = list(dict.fromkeys(str(key[0]) for key in told))
    # Published are full transfers, which stand beside nothing that trained on 1,000 examples.
    published = {} if suite.protocol == "vtab-1k" else PUBLISHED
    lines = []
    for name in names:
        cells = [str(told[(name, *key)]) if (name, *key) in told else "—" for key in ours]
        lines.append([name, *cells, *(figures.get(name, "") for figures in published.values())])
    table = markdown(["dataset", *heads, *(f"{model}, published" for model in published)], lines)
    return [_vtab(rows, ours), table] if suite.protocol == "vtab-1k" else [table]


def _vtab(rows: Sequence[Row], ours: Sequence[tuple[object, ...]]) -> str:
    """The mean over each group's tasks, seed by seed; then the mean over all tasks."""
    lines = []
    for method, arch, upstream in ours:
        own = [row for row in rows if (row.method, row.arch, row.upstream) == (method, arch, upstream)]
        cells = [str(figure(means)) if (means := group_means(own, group)) else "—" for group in (*GROUPS, None)]
        lines.append([f"{arch}, {upstream}: {curves.NAMES[str(method)]}", *cells])
    lines.append(["BiT-L, published", "", "", "", VTAB_MEAN])
    return markdown(["network", *GROUPS, "mean of the tasks"], lines)


def group_means(rows: Sequence[Row], group: str | None) -> list[float]:
    """For every seed the mean accuracy over the tasks of a group, None for all."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if group in (None, row.group):
            by_seed.setdefault(row.seed, []).append(row.accuracy)
    return [statistics.mean(values) for values in by_seed.values()]


def _order(suite: Suite, starts: Mapping[Upstream, Start]):  # type: ignore[no-untyped-def]
    """Datasets and methods as the suite names them, upstreams from the smallest."""
    places = {(up.arch, up.label): place for place, up in enumerate(starts)}
    return lambda key: (suite.datasets.index(key[0]), suite.methods.index(key[1]), places[key[2:]])


def differences(
    suite: Suite, rows: Sequence[Row], config: Config, starts: Mapping[Upstream, Start], most: Mapping[str, int]
) -> str:
    """What stands between these figures and the paper's."""
    stage, resize, crop = config.finetune, *PRESETS[config.finetune.preset][:2]
    stated = finetune.deviations(stage) | ({"steps": suite.steps} if suite.steps else {})
    lines = [
        f"upstream: {', '.join(_told(up, start) for up, start in starts.items())}; published BiT-M saw ImageNet-21k "
        "(14 million pictures), BiT-L JFT-300M",
        f"HyperRule `{stage.preset}` ({resize} → {crop} pixels from 96 × 96 on, 160 → 128 below)"
        + (f", deviating in {', '.join(f'{key}={value}' for key, value in stated.items())}" if stated else ""),
        f"the head starts from a normal draw of deviation {config.benchmark.head_std:g} by the seed (paper: zero)"
        if config.benchmark.head_std
        else "the head starts at zero, as the paper's: only draws and order differ between seeds",
        f"{suite.seeds} seeds draw the examples, their order and the head",
    ]
    decay = PRESETS[stage.preset][2] if stage.weight_decay is None else stage.weight_decay
    if decay:
        lines.append(f"weight decay {decay:g} (paper: 0)")
    if suite.protocol == "vtab-1k":
        lines.append(
            "trained on 800 examples, the 200 for validation choose nothing (the HyperRule has nothing to choose)"
        )
    if short := {name: count for name, count in most.items() if any(shots > count for shots in suite.shots)}:
        told = ", ".join(f"{name} has {count}" for name, count in short.items())
        lines.append(f"— stands where the smallest class has too few training examples: {told}")
    if suite.protocol == "out-of-distribution":
        lines.append(
            "asked about all classes tuned on; right is any that the mapping names; classes without one are left out"
        )
    return "What differs from the paper:\n\n" + "\n".join(f"- {line}" for line in lines)


def _told(up: Upstream, start: Start) -> str:
    count = "" if start.pictures is None else f" ({start.pictures:,} pictures)"
    return f"{up.arch} {up.label}{count}"
