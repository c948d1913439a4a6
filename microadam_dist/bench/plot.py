"""The time of a step against the number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .measure import Row


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw one panel a dtype, both axes logarithmic: a step that costs the same a parameter is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    figure, panels = pyplot.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        for contender in dict.fromkeys(row.contender for row in rows):
            points = sorted(
                {
                    row.numel: row.ns_median * row.numel / 1e6
                    for row in rows
                    if (row.contender, row.dtype) == (contender, dtype)
                }.items()
            )
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=contender)
        panel.set(xscale="log", yscale="log", xlabel="parameters", title=f"{dtype} weights and gradients")
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("median time of a step, ms")
    panels[0][-1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
