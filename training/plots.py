"""The pictures that a person looks at after a stage: learning curves, confusion matrix, the worst mistakes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, BLUE, ORANGE, GRAY = "#1b1f24", "#2563eb", "#d97706", "#9aa4b2"
History = Mapping[str, Sequence[tuple[int, float]]]


def learning_curves(histories: Mapping[str, History], path: Path) -> None:
    """Loss, test accuracy and learning rate over the optimizer steps; one line per training (name → history)."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = (("loss", "training loss"), ("test_accuracy", "test accuracy"), ("lr", "learning rate"))
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for (label, history), colour in zip(histories.items(), (BLUE, ORANGE, GRAY), strict=False):
            points = history.get(name, [])
            marker = "o" if len(points) < 12 else None
            axes.plot([s for s, _ in points], [v for _, v in points], label=label, color=colour, marker=marker, ms=4)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "lr":
            axes.set_yscale("symlog", linthresh=1e-4)
        if name == "test_accuracy":
            axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    if len(histories) > 1:
        figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def confusion_matrix(labels: NDArray[np.int64], answers: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Rows: the true class; columns: the answer; each row as shares of its class. labels, answers: [n]."""
    count = len(classes)
    matrix = np.zeros((count, count))
    np.add.at(matrix, (labels, answers), 1)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(10.0, max(3.4, 1.6 + 0.42 * count))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, format=mpl.ticker.PercentFormatter(1.0), fraction=0.046)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    if count <= 30:
        axes.set_xticks(range(count), classes, rotation=45 if max(map(len, classes)) > 2 else 0, ha="right", fontsize=8)
        axes.set_yticks(range(count), classes, fontsize=8)
    if count <= 15:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.5 else INK
            text = f"{matrix[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=120)


def contact_sheet(images: Sequence[NDArray[np.uint8]], captions: Sequence[str], path: Path) -> None:
    """Pictures [h, w, 3] with a caption each, in rows of eight."""
    columns = 8
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(columns * 1.35, rows * 1.6), layout="constrained")
    cells = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, image, caption in zip(cells, images, captions, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set_title(caption, fontsize=7, color=INK)
    if not images:
        figure.text(0.5, 0.5, "no mistakes", ha="center", color=INK)
    figure.savefig(path, dpi=120)


def accuracy_bars(names: Sequence[str], series: Mapping[str, Sequence[float | None]], path: Path) -> None:
    """Accuracy of every tenant, one bar per series (by transfer, from scratch); None leaves a bar out."""
    figure = Figure(figsize=(8, max(1.8, 0.8 + 0.55 * len(names))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(series))
    for index, ((label, values), colour) in enumerate(zip(series.items(), (BLUE, GRAY), strict=False)):
        places = [row + (index - (len(series) - 1) / 2) * height for row in range(len(names))]
        shown = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
        if not shown:
            continue
        bars = axes.barh([p for p, _ in shown], [v for _, v in shown], height * 0.9, label=label, color=colour)
        axes.bar_label(bars, [f"{value:.1%}" for _, value in shown], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("test accuracy", fontsize=10, color=INK)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
