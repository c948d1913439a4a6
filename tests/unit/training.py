"""A deterministic training loop without a model, and the bits of what it trained."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from microadam_dist import MicroAdam

SHAPES = [(40, 136), (32, 16, 3, 3), (136,), (4, 8)]  # two on the Top-K path, two on the dense path


def make_params(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def microadam(params: ParamsT, **settings: Any) -> MicroAdam:
    """With the paper's settings unless others are given: a window is more state to get wrong than the default has."""
    return MicroAdam(params, **{**MicroAdam.paper_defaults(), **settings})


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient(p: Tensor, seed: int, index: int = 0) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * index + seed)).to(p.dtype)


def train(
    optimizer: Optimizer, seeds: Iterable[int], skip: Callable[[int, int], bool] = lambda seed, index: False
) -> None:
    """One step for each seed; the gradients depend on the seed and on the parameter's position only.

    Args:
        optimizer: Any optimizer.
        seeds: One step each.
        skip: ``skip(seed, index)`` is true for a parameter that gets no gradient.
    """
    for seed in seeds:
        for index, p in enumerate(params_of(optimizer)):
            p.grad = None if skip(seed, index) else gradient(p, seed, index)
        optimizer.step()


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def snapshot(optimizer: Optimizer) -> list[Any]:
    """The bits of every parameter and of its state, in the order of the parameters."""
    return [
        (bits(p), {name: bits(tensor) for name, tensor in optimizer.state.get(p, {}).items()})
        for p in params_of(optimizer)
    ]


def steps_of(optimizer: Optimizer) -> list[int]:
    return [int(optimizer.state[p]["step"]) for p in params_of(optimizer)]
