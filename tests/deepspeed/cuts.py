"""What one process computes, and which blocks a shard edge cuts: all others have its bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from microadam_dist import MicroAdam
from microadam_dist.layout import StateLayout

from .engines import SETTINGS, make_gradients, make_model


def plain_weights(dtype: torch.dtype, num_steps: int, has_master: bool = True) -> dict[str, Tensor]:
    """One process without an engine; in bf16 with an fp32 master copy, as DeepSpeed has it, or without."""
    stepped = torch.float32 if has_master else dtype
    model = make_model(dtype).to(stepped)
    optimizer = MicroAdam(model.parameters(), **SETTINGS)
    for grads in make_gradients(num_steps, dtype):
        model({name: grad.to(stepped) for name, grad in grads.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removesuffix(".weight"): p.detach().to(dtype) for name, p in model.named_parameters()}


def cut_intervals(layouts: Iterable[StateLayout]) -> list[tuple[str, int, int]]:
    """(parameter, global start, length) of the fragments."""
    intervals = []
    for layout in layouts:
        for run in layout.runs:
            if run.is_fragment:
                span = next(s for s in layout.spans if 0 <= run.elements.start - s.offset < s.numel)
                intervals.append((span.fqn, span.start + run.elements.start - span.offset, run.numel))
    return intervals


def uncut_masks(
    weights: dict[str, Tensor], cuts: Iterable[tuple[str, int, int]], suffix: str = ".weight"
) -> dict[str, Tensor]:
    """True for every element, flat, that lies in none of the cut intervals."""
    masks = {name: torch.ones(weight.numel(), dtype=torch.bool) for name, weight in weights.items()}
    for fqn, start, numel in cuts:
        masks[fqn.removesuffix(suffix)][start : start + numel] = False
    return masks
