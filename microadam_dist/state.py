"""Allocates what `StateLayout` says and names the views of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import WINDOW_TENSORS, BlockRun, Extent, StateLayout
from .window import Slot, decode_indices

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
    """Flat state tensors in the shapes in which they are kept and saved; views. ``step`` stays as it is."""
    return {name: tensor if name == "step" else tensor.view(layout.shapes[name]) for name, tensor in state.items()}


def flatten_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `shape_state`."""
    return {name: tensor if name == "step" else tensor.view(-1) for name, tensor in state.items()}


@dataclass(frozen=True)
class BlockViews:
    """Strided views of what belongs to some rows of one `BlockRun`; writing to them writes to the state.

    Attributes:
        param: (rows, cols, numel), dtype of the parameter.
        grad: (rows, cols, numel), dtype of the gradient, or None where only the weights are updated.
        codes: (rows, cols, code_bytes) uint8, or None without error feedback or gradient.
        bucket_lo, bucket_hi: (rows, cols, num_buckets) bf16, likewise.
        indices: (rows, cols, window_size, index_bytes) uint8, or None when no window is stored; see `window.Slot`.
        values: (rows, cols, window_size, num_kept) bf16 or uint8, likewise.
        scales: (rows, cols, window_size, 1) bf16, or None when no packed window is stored.
    """

    param: Tensor
    grad: Tensor | None
    codes: Tensor | None
    bucket_lo: Tensor | None
    bucket_hi: Tensor | None
    indices: Tensor | None
    values: Tensor | None
    scales: Tensor | None

    def slot(self, number: int) -> Slot | None:
        """A slot of the window of all blocks; None: no window is stored."""
        if self.indices is None or self.values is None:
            return None
        scales = None if self.scales is None else self.scales[:, :, number].flatten(0, 1)
        return Slot(self.indices[:, :, number].flatten(0, 1), self.values[:, :, number].flatten(0, 1), scales)

    def store_slot(self, number: int, slot: Slot) -> None:
        """In place: a slot of the window, if one is stored."""
        for stored, new in zip((self.indices, self.values, self.scales), slot, strict=True):
            if stored is not None and new is not None:
                stored[:, :, number] = new.view(*stored.shape[:2], -1)

    def copy_of(self, rows: Sequence[int], cols: Sequence[int]) -> BlockViews:
        """Copies of the blocks (rows[i], cols[i]), as many rows of one block each."""
        row, col = (torch.tensor(places, device=self.param.device) for places in (rows, cols))
        copies: dict[str, Any] = {
            name: None if view is None else view[row, col].unsqueeze(1) for name, view in vars(self).items()
        }
        return BlockViews(**copies)


def concatenate(parts: Sequence[BlockViews]) -> BlockViews:
    """Copies of blocks of one shape, one part after the other along the rows."""
    fields = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    copies: dict[str, Any] = {name: None if views[0] is None else torch.cat(views) for name, views in fields.items()}
    return BlockViews(**copies)


def block_views(
    layout: StateLayout, run: BlockRun, param: Tensor, grad: Tensor | None, state: Mapping[str, Tensor], rows: range
) -> BlockViews:
    """Views of the blocks in ``rows`` of ``run``.

    Args:
        layout: The layout ``run`` comes from.
        run: Blocks of equal length.
        param: Local tensor, contiguous, of any shape.
        grad: Its gradient, likewise, or None.
        state: The state tensors, likewise, by name.
        rows: Consecutive rows of the run.
    """

    def view(tensor: Tensor, extent: Extent) -> Tensor:
        return tensor.as_strided(
            (len(rows), run.cols, extent.size),
            (extent.row_stride, extent.size, 1),
            tensor.storage_offset() + extent.start + rows.start * extent.row_stride,
        )

    has_error_feedback = layout.config.ef_bits > 0 and grad is not None
    return BlockViews(
        param=view(param, run.elements),
        grad=None if grad is None else view(grad, run.elements),
        codes=view(state["codes"], run.codes) if has_error_feedback else None,
        bucket_lo=view(state["bucket_lo"], run.buckets) if has_error_feedback else None,
        bucket_hi=view(state["bucket_hi"], run.buckets) if has_error_feedback else None,
        **{name: _window_view(layout, run, state, name, rows) for name in WINDOW_TENSORS},
    )


def _window_view(
    layout: StateLayout, run: BlockRun, state: Mapping[str, Tensor], name: str, rows: range
) -> Tensor | None:
    """What a window tensor has of the blocks in ``rows``: (rows, cols, window_size, of a slot); None: not stored."""
    if name not in layout.tensors:
        return None
    tensor, slots, extent = state[name], layout.config.window_size, getattr(run, name)
    return tensor.as_strided(
        (len(rows), run.cols, slots, extent.size),
        (slots * extent.row_stride, slots * extent.size, extent.size, 1),
        tensor.storage_offset() + slots * (extent.start + rows.start * extent.row_stride),
    )


def indices_are_valid(layout: StateLayout, indices: Tensor) -> bool:
    """Whether every stored index lies in its block; a kernel trusts them.

    Args:
        layout: A layout with a window.
        indices: The flat ``indices`` tensor, uint8.
    """
    for run in layout.runs:
        stored = _window_view(layout, run, {"indices": indices}, "indices", range(run.rows))
        assert stored is not None
        slots = stored.reshape(-1, stored.shape[3])
        numbers = decode_indices(slots, run.num_kept, layout.config.packed_window)
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < run.numel:
            return False
    return True
