"""Top-K blocks of one length, as views of a local tensor and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import ERROR_TENSORS, BlockRun, Extent, StateLayout
from .error_feedback import StoredError
from .rounding import counters, shape_key
from .window import Window


class Blocks(NamedTuple):
    """What belongs to rows x cols blocks of n elements; writing to it writes to the state.

    Attributes:
        param: (rows, cols, n), dtype of the parameter.
        grad: (rows, cols, n), dtype of the gradient, or None where only the weights are updated.
        error: (rows, cols, x) each, or None without error feedback or gradient.
        window: (rows, cols, window_size, x) each, or None when no window is stored.
        counters: (rows, cols, 1) int32, those of their first elements, see `rounding`; None: weights are rounded to
            nearest. Not a view.
    """

    param: Tensor
    grad: Tensor | None
    error: StoredError | None
    window: Window | None
    counters: Tensor | None

    def copy_of(self, rows: Sequence[int], cols: Sequence[int]) -> Blocks:
        """Copies of the blocks (rows[i], cols[i]), as many rows of one block each."""
        row, col = (torch.tensor(places, device=self.param.device) for places in (rows, cols))
        copies: Blocks = map_tensors(lambda view: view[row, col].unsqueeze(1), self)
        return copies


def concatenate(parts: Sequence[Blocks]) -> Blocks:
    """Copies of blocks of one shape, one part after the other along the rows."""
    joined: Blocks = map_tensors(lambda *views: torch.cat(views), *parts)
    return joined


def map_tensors(function: Callable[..., Tensor], *parts: Any) -> Any:
    """The same tuple of tensors, Nones and tuples of these, of what the function makes of the tensors."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return function(*parts)
    return type(parts[0])(*(map_tensors(function, *fields) for fields in zip(*parts, strict=True)))


def block_views(
    layout: StateLayout,
    run: BlockRun,
    param: Tensor,
    grad: Tensor | None,
    state: Mapping[str, Tensor],
    rows: range,
    step_key: int | None = None,
) -> Blocks:
    """Views of the blocks in ``rows`` of ``run``.

    Args:
        layout: The layout ``run`` comes from.
        run: Blocks of equal length.
        param: Local tensor, contiguous, of any shape.
        grad: Its gradient, likewise, or None.
        state: The state tensors, likewise, by name.
        rows: Consecutive rows of the run.
        step_key: See `rounding`; None: weights are rounded to nearest.
    """

    def view(tensor: Tensor, extent: Extent) -> Tensor:
        return _view(tensor, run, extent, rows).squeeze(2)

    error = None
    if layout.config.ef_bits and grad is not None:
        names = [name for name in ERROR_TENSORS if name in state]
        error = StoredError.of({x: view(state[x], run.codes if x == "codes" else run.buckets) for x in names})
    return Blocks(
        view(param, run.elements),
        None if grad is None else view(grad, run.elements),
        error,
        window_views(layout, run, state, rows) if layout.has_window else None,
        None if step_key is None else _first_counters(layout, run, rows, step_key, param.device),
    )


def _first_counters(layout: StateLayout, run: BlockRun, rows: range, step_key: int, device: torch.device) -> Tensor:
    row, col = (torch.arange(x.start, x.stop, device=device) for x in (rows, range(run.cols)))
    span, extent = layout.spans[run.span_index], run.elements
    places = extent.start + row.view(-1, 1, 1) * extent.row_stride + col.view(-1, 1) * extent.size
    return counters(span.origin + places, step_key, shape_key(span.global_shape))


def window_views(layout: StateLayout, run: BlockRun, state: Mapping[str, Tensor], rows: range) -> Window:
    """What the window's tensors have of the blocks in ``rows``; the layout has a window."""
    slots, scales = layout.config.window_size, state["scales"] if layout.config.packed_window else None
    return Window(
        _view(state["indices"], run, run.indices, rows, slots),
        _view(state["values"], run, run.values, rows, slots),
        None if scales is None else _view(scales, run, run.scales, rows, slots),
    )


def _view(tensor: Tensor, run: BlockRun, extent: Extent, rows: range, slots: int = 1) -> Tensor:
    """What the blocks have in a tensor with so many slots of each, one after the other: (rows, cols, slots, x)."""
    return tensor.as_strided(
        (len(rows), run.cols, slots, extent.size),
        (slots * extent.row_stride, slots * extent.size, extent.size, 1),
        tensor.storage_offset() + slots * (extent.start + rows.start * extent.row_stride),
    )
