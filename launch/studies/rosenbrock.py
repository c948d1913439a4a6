"""Figure 1 of the MicroAdam paper: error feedback brings Top-K Adam back to the path of Adam.

    python launch/studies/rosenbrock.py --output runs/rosenbrock

Adam, and MicroAdam that keeps the larger of the two coordinates, with and without error feedback, on the Rosenbrock
function from (-1/2, 1). The window is as long as the run, so that the moments come from the full history.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.optim import Optimizer

from microadam_dist import MicroAdam

START = (-0.5, 1.0)
LR = 0.01
# One row of 4096 elements takes the Top-K path, and this density keeps one of them.
ROW_NUMEL, KEEP_ONE = 4096, 0.0002
# After so many steps Adam has arrived; its path until there is what the others are compared with.
ADAM_STEPS = 8000


def gradient(x: float, y: float) -> tuple[float, float]:
    """Of (1 - x)^2 + 100 (y - x^2)^2."""
    return -2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)


def path(make_optimizer: Callable[[list[Tensor]], Optimizer], num_steps: int) -> Tensor:
    """Points of an optimizer from `START` on: (num_steps + 1, 2). All but the first two weights have gradient 0."""
    param = torch.nn.Parameter(torch.zeros(1, ROW_NUMEL))
    param.data[0, :2] = torch.tensor(START)
    param.grad = torch.zeros_like(param)
    optimizer = make_optimizer([param])
    points = [param.detach()[0, :2].clone()]
    for _ in range(num_steps):
        param.grad[0, :2] = torch.tensor(gradient(*points[-1].tolist()))
        optimizer.step()
        points.append(param.detach()[0, :2].clone())
    return torch.stack(points)


def adam_path() -> Tensor:
    """The path of `torch.optim.Adam`."""
    return path(lambda params: torch.optim.Adam(params, lr=LR), ADAM_STEPS)


def top_k_path(num_steps: int, *, ef_bits: int) -> Tensor:
    """The path of `MicroAdam` keeping one coordinate per step; ``ef_bits`` 0 is Top-K Adam without error feedback."""
    return path(
        lambda params: MicroAdam(params, lr=LR, density=KEEP_ONE, window_size=num_steps, ef_bits=ef_bits), num_steps
    )


def farthest_from(curve: Tensor, points: Tensor) -> float:
    """The largest distance of any of the points from the polyline ``curve``."""
    start, edge = curve[:-1], curve[1:] - curve[:-1]
    along = ((points[:, None] - start) * edge).sum(-1) / edge.square().sum(-1).clamp_min(1e-20)
    nearest = start + along.clamp(0, 1)[..., None] * edge
    return float((points[:, None] - nearest).norm(dim=-1).amin(dim=1).max())


def main(output: Annotated[Path, typer.Option(help="Folder for rosenbrock.svg.")], num_steps: int = 1000) -> None:
    """Draw the three paths and print how far each strays from Adam's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    adam = adam_path()
    paths = {
        "Top-K Adam": top_k_path(num_steps, ef_bits=0),
        "Top-K Adam with error feedback (MicroAdam)": top_k_path(num_steps, ef_bits=4),
    }
    _, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
    x, y = torch.meshgrid(torch.linspace(-1.1, 1.1, 200), torch.linspace(-0.2, 1.2, 200), indexing="xy")
    values = (1 - x).square() + 100 * (y - x * x).square()
    axes.contour(x, y, values, levels=torch.logspace(-1, 3, 20).tolist(), colors="lightgrey", linewidths=0.7)
    axes.plot(*adam.T, label=f"Adam, {ADAM_STEPS} steps", linewidth=3, alpha=0.5)
    for name, points in paths.items():
        distance = farthest_from(adam, points)
        print(f"{name}: farthest from Adam's path {distance:.4f}")
        axes.plot(*points.T, label=f"{name}, {num_steps} steps: at most {distance:.3f} away", linewidth=1)
    axes.plot(*START, "k.")
    axes.plot(1, 1, "k*", markersize=10)
    axes.set(title="Rosenbrock, learning rate 0.01", xlabel="x", ylabel="y")
    axes.legend(fontsize=8)
    output.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(output / "rosenbrock.svg")
    pyplot.savefig(output / "rosenbrock.png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
