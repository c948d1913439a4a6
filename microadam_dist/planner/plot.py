"""The picture of a plan: one bar an optimizer, lines at the sizes of GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError
from .gpus import GIB, GPUS


def draw(file: Path, title: str, bars: Mapping[str, Mapping[str, int]]) -> None:
    """Write the picture.

    Args:
        file: Its suffix decides the format.
        title: Above the bars.
        bars: Optimizer -> part -> bytes, from the bottom up; the same parts for each optimizer.

    Raises:
        ConfigError: matplotlib is missing, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    bottoms = [0.0] * len(bars)
    for part in next(iter(bars.values())):
        heights = [parts[part] / GIB for parts in bars.values()]
        if any(heights):
            highest = axes.bar(list(bars), heights, bottom=bottoms, width=0.55, label=part)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.bar_label(highest, labels=[f"{total:.1f} GiB" for total in bottoms], padding=2)
    top = 1.2 * max(bottoms)
    for nominal_gb, gib in {gpu.nominal_gb: gpu.gib for gpu in reversed(GPUS)}.items():  # the smallest of each class
        if 0.2 * top < gib < top:
            axes.axhline(gib, color="gray", linewidth=0.8, linestyle="--", zorder=0)
            axes.text(-0.78, gib, f"{nominal_gb} GB GPU", va="bottom", fontsize=8, color="gray")
    axes.set(ylabel="GiB on each rank at the peak", ylim=(0, top), xlim=(-0.8, len(bars) - 0.5))
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center")
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise ConfigError(f"--plot {file}: {error}") from None
