"""Plots of a suite: accuracy by examples per class, by the size of upstream, by wrong labels, by group of tasks."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.study.results import Row
from training.study.suites import Suite

INK = "#1b1f24"
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#4b5563", "#ca8a04")
NAMES = {"ridge": "ridge regression", "linear": "linear probe", "finetune": "fine-tuning"}


def draw(suite: Suite, rows: Sequence[Row], pictures: Mapping[tuple[str, str], int], folder: Path) -> list[Path]:
    """Every plot that the suite's results have points for; returns their paths."""
    made = []
    if len({row.shots for row in rows}) > 1:
        made.append(_panels(rows, lambda row: row.shots, _upstream, "examples per class", folder / "by_shots.png"))
    sizes = {pictures[row.arch, row.upstream] for row in rows if pictures.get((row.arch, row.upstream))}
    if len(sizes) > 1:
        sized = [row for row in rows if pictures.get((row.arch, row.upstream))]
        path = folder / "by_upstream.png"
        made.append(
            _panels(sized, lambda row: pictures[row.arch, row.upstream], _few_or_many(rows), "pictures upstream", path)
        )
    if len({row.noise for row in rows}) > 1:
        path = folder / "by_noise.png"
        made.append(
            _panels(rows, lambda row: row.noise, lambda row: row.arch, "wrong labels upstream", path, shares=True)
        )
    if len({row.group for row in rows}) > 1:
        made.append(_groups(rows, folder / "by_group.png"))
    return made


def _upstream(row: Row) -> str:
    return f"{row.arch}, {row.upstream}"


def _few_or_many(rows: Sequence[Row]) -> Callable[[Row], str]:
    several = len({row.shots for row in rows}) > 1
    return lambda row: f"{row.arch}, {row.shots} per class" if several else row.arch


def _panels(
    rows: Sequence[Row],
    x_of: Callable[[Row], float],
    line_of: Callable[[Row], str],
    label: str,
    path: Path,
    shares: bool = False,
) -> Path:
    """A panel per dataset and method: the median over the seeds at each x, with bars of one standard deviation."""
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    methods = [method for method in NAMES if any(row.method == method for row in rows)]
    lines = list(dict.fromkeys(map(line_of, rows)))
    figure = Figure(figsize=(3.4 * len(methods) + 0.4, 2.7 * len(datasets) + 0.6), layout="constrained")
    grid = figure.subplots(len(datasets), len(methods), squeeze=False, sharey="row")
    for dataset, across in zip(datasets, grid, strict=True):
        for method, axes in zip(methods, across, strict=True):
            own = [row for row in rows if (row.dataset, row.method) == (dataset, method)]
            for number, line in enumerate(lines):
                points: dict[float, list[float]] = {}
                for row in own:
                    if line_of(row) == line:
                        points.setdefault(x_of(row), []).append(row.accuracy)
                if points:
                    xs = sorted(points)
                    y = [statistics.median(points[x]) for x in xs]
                    deviation = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
                    colour = COLOURS[number % len(COLOURS)]
                    axes.errorbar(xs, y, deviation, label=line, color=colour, marker="o", ms=4, capsize=2, lw=1.5)
            _dress(axes, f"{dataset}: {NAMES[method]}", sorted({x_of(row) for row in rows}), shares)
        across[0].set_ylabel("test accuracy", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel(label, fontsize=9)
    handles = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, frameon=False, fontsize=8, loc="outside lower center", ncols=min(3, len(lines))
    )
    figure.savefig(path, dpi=110)
    return path


def _dress(axes: Axes, title: str, ticks: Sequence[float], shares: bool) -> None:
    axes.set_title(title, fontsize=9, color=INK)
    if not shares:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.0%}" if shares else f"{tick:,.0f}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _groups(rows: Sequence[Row], path: Path) -> Path:
    """Bars of the mean over each group's tasks: the median over the seeds, with one standard deviation."""
    groups = list(dict.fromkeys(row.group for row in rows))
    kinds = list(dict.fromkeys((row.method, _upstream(row)) for row in rows))
    figure = Figure(figsize=(2.2 + 1.9 * len(groups), 3.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(kinds)
    for number, (method, upstream) in enumerate(kinds):
        middles, deviations = [], []
        for group in groups:
            by_seed: dict[int, list[float]] = {}
            for row in rows:
                if (row.method, _upstream(row), row.group) == (method, upstream, group):
                    by_seed.setdefault(row.seed, []).append(row.accuracy)
            means = [statistics.mean(values) for values in by_seed.values()] or [np.nan]
            middles.append(statistics.median(means))
            deviations.append(statistics.stdev(means) if len(means) > 1 else 0.0)
        places = np.arange(len(groups)) + (number - (len(kinds) - 1) / 2) * width
        label = f"{NAMES[method]}: {upstream}"
        axes.bar(
            places, middles, width * 0.92, yerr=deviations, capsize=2, label=label, color=COLOURS[number % len(COLOURS)]
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("test accuracy, mean of the tasks", fontsize=9)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, axis="y")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=min(2, len(kinds)))
    figure.savefig(path, dpi=110)
    return path
