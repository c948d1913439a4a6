"""The state tensors that a `StateLayout` describes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..layout import DENSE_TENSORS, SPARSE_DTYPES, StateLayout
from .blocks import window_views
from .window import decode_indices

# Every key that MicroAdam has in the state of a parameter; wrappers of optimizers (Lookahead, ...) add others.
OWN_NAMES = frozenset(("step", *SPARSE_DTYPES, *DENSE_TENSORS))

_TORCH_DTYPES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float32": torch.float32}


def state_specs(layout: StateLayout) -> dict[str, tuple[torch.dtype, int]]:
    """Name -> (dtype, number of elements) of the state tensors of one local tensor."""
    return {name: (_TORCH_DTYPES[dtype], numel) for name, (dtype, numel) in layout.tensors.items()}


def allocate_state(layout: StateLayout, device: torch.device) -> dict[str, Tensor]:
    """All-zero state: codes and ranges of zero decode to a zero error, the window is empty, the moments are zero."""
    return {
        name: torch.zeros(numel, dtype=dtype, device=device) for name, (dtype, numel) in state_specs(layout).items()
    }


def shape_state(layout: StateLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat state tensors in the shapes in which they are kept and saved; views. Everything else stays as it is."""
    shapes = layout.shapes
    return {name: tensor.view(shapes[name]) if name in shapes else tensor for name, tensor in state.items()}


def flatten_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `shape_state`."""
    return {name: tensor if name == "step" else tensor.view(-1) for name, tensor in state.items()}


def indices_are_valid(layout: StateLayout, state: Mapping[str, Tensor]) -> bool:
    """Whether every index of the window lies in its block; a kernel trusts them.

    Args:
        layout: A layout with a window.
        state: The state tensors, flat, uint8 and bf16.
    """
    for run in layout.runs:
        indices = window_views(layout, run, state, range(run.rows)).indices
        numbers = decode_indices(indices.flatten(0, 2), run.num_kept, layout.config.packed_window)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < run.numel:
            return False
    return True
