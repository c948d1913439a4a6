"""Figures of a report, each an SVG that an HTML page can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from .runs import Row

_COLORS = colormaps["tab20"].colors
_MARKERS = "osD^vPX*<>"


def data_uri(figure: Figure) -> str:
    """A figure as the source of an <img>."""
    buffer = io.BytesIO()
    save(figure, buffer)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def save(figure: Figure, file: Path | BinaryIO) -> None:
    """Write a figure as SVG: the same figure is the same file, and its text is text."""
    with rc_context({"svg.hashsalt": "microadam_dist", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def _figure(height: float) -> Figure:
    return Figure(figsize=(9, height), layout="constrained")


def _styles(rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, object]]]:
    """Rows that have results, each with its colour and marker, which depend on the place in the study alone."""
    for index, row in enumerate(rows):
        if row.test:
            yield row, {"color": _COLORS[index * 2 % 20 + index // 10 % 2], "marker": _MARKERS[index % len(_MARKERS)]}


def _finish(axes: Axes, title: str, xlabel: str, ylabel: str) -> Figure:
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes.figure


def frontier(rows: Sequence[Row], counted: str = "state") -> Figure:
    """Test loss against bytes of "state" or "weights and state"; the line joins what nothing beats in both."""
    has_weights = "weights" in counted

    def size(row: Row) -> float:
        return row.bytes_per_param + (row.weight_bytes_per_param if has_weights else 0)

    axes = _figure(4.8).subplots()
    for row, style in _styles(rows):
        low, high = row.mean_test - min(row.test), max(row.test) - row.mean_test
        axes.errorbar(size(row), row.mean_test, [[low], [high]], label=row.optimizer, capsize=3, linestyle="", **style)
    best, corners = math.inf, []
    for row in sorted((row for row in rows if row.test), key=lambda row: (size(row), row.mean_test)):
        if row.mean_test < best:
            best = row.mean_test
            corners.append((size(row), best))
    axes.plot(*zip(*corners, strict=True), color="grey", linewidth=1, zorder=0, drawstyle="steps-post")
    axes.set_xscale("symlog", linthresh=0.5)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([2, 3, 4, 6, 8, 12] if has_weights else [0, 0.5, 1, 2, 4, 8])
    axes.set_xlim(left=1.8 if has_weights else None)
    label = f"{counted}, bytes per parameter"
    return _finish(axes, "Memory against loss", label, "test loss (bar: all seeds)")


def rates(rows: Sequence[Row]) -> Figure:
    """Validation loss against learning rate."""
    axes = _figure(4.2).subplots()
    for row, style in _styles(rows):
        points = [(lr, loss) for lr, loss in row.rates.items() if math.isfinite(loss)]
        axes.plot(*zip(*points, strict=True), label=row.optimizer, markersize=4, linewidth=1, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    best = min(min(row.rates.values()) for row, _ in _styles(rows))
    axes.set_ylim(best * 0.98, best * 1.35)
    return _finish(axes, "Learning rates tried", "learning rate", "validation loss")


def factors(lengths: Sequence[tuple[int, Sequence[Row]]], baseline: str) -> Figure:
    """How many times the baseline's the best learning rate of the others is, against the steps of the task."""
    axes = _figure(4.2).subplots()
    points: dict[str, list[tuple[int, float]]] = {}
    for steps, rows in lengths:
        optimum = {row.optimizer: row.optimum[0] for row in rows if row.optimum}
        for name in optimum if baseline in optimum else ():
            points.setdefault(name, []).append((steps, optimum[name] / optimum[baseline]))
    for row, style in _styles(lengths[0][1]):
        if row.optimizer in points and row.optimizer != baseline:
            axes.plot(*zip(*points[row.optimizer], strict=True), label=row.optimizer, linestyle="", **style)
    axes.axhspan(2, 4.5, color="grey", alpha=0.2, linewidth=0, label="3, within a factor of 1.5")
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(sorted({steps for steps, _ in lengths}))
    return _finish(axes, "One factor for every length?", "steps", f"best learning rate / that of {baseline}")


def curves(rows: Sequence[Row]) -> Figure:
    """Training and validation loss over the steps, at the best learning rate."""
    axes = _figure(4.2).subplots()
    for row, style in _styles(rows):
        axes.plot(*zip(*row.first["train_curve"], strict=True), color=style["color"], alpha=0.25, linewidth=0.8)
        axes.plot(
            *zip(*row.first["validation_curve"], strict=True), label=row.optimizer, markersize=4, linewidth=1, **style
        )
    lowest = min(loss for row, _ in _styles(rows) for _, loss in row.first["validation_curve"])
    highest = max(row.first["train_curve"][0][1] for row, _ in _styles(rows))
    axes.set_ylim(min(lowest, highest) * 0.9, highest * 1.05)
    return _finish(axes, "Loss at the best rate: validation (marks), training (thin)", "step", "loss")


def traces(rows: Sequence[Row]) -> Figure:
    """Norms of the error feedback and of the gradient, and bytes of state, over the steps."""
    figure = _figure(6.5)
    above, below = figure.subplots(2, sharex=True)
    for row, style in _styles(rows):
        trace, num_params = row.first["trace"], row.first["num_params"]
        steps = [point["step"] for point in trace]
        line = {"color": style["color"], "linewidth": 1}
        if any(point["error_norm"] for point in trace):
            above.plot(steps, [point["error_norm"] for point in trace], label=f"{row.optimizer}: error", **line)
        above.plot(
            steps, [point["grad_norm"] for point in trace], label=f"{row.optimizer}: gradient", alpha=0.4, **line
        )
        below.plot(steps, [point["state_bytes"] / num_params for point in trace], label=row.optimizer, **line)
    above.set_yscale("log")
    _finish(above, "Norms of error feedback and gradient", "", "norm")
    _finish(below, "State", "step", "bytes per parameter")
    below.set_ylim(bottom=0)
    return figure
