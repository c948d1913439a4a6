"""Whole parameters on one device: single process, DDP, and engines that keep one master copy of each parameter."""

from __future__ import annotations

from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import ShardSpan
from .base import Slot


def find_spans(slot: Slot) -> tuple[ShardSpan, ...] | None:
    """One span: the whole parameter."""
    for group in slot.constructed:
        for named in group:
            if named.param is slot.tensor:
                _refuse_sharded(named.fqn, slot.tensor)
                return (_whole(named.fqn, slot.tensor),)
    return None


def whitelist(optimizer_class: type) -> None:
    """Nothing to do."""


def _whole(fqn: str, tensor: Tensor) -> ShardSpan:
    return ShardSpan(fqn, tuple(tensor.shape), start=0, numel=tensor.numel())


def _refuse_sharded(fqn: str, tensor: Tensor) -> None:
    # A DTensor or an FSDP1 view looks like a whole parameter, and would get the wrong grid.
    if hasattr(tensor, "placements"):
        got = f"a DTensor with placements {tensor.placements}"
    elif getattr(tensor, "_fsdp_flattened", False):
        got = "a view into an FSDP flat parameter"
    else:
        return
    raise UnsupportedLayoutError(
        f"parameter {fqn!r} is {got}; MicroAdam cannot shard its state this way yet. Use DeepSpeed ZeRO or DDP."
    )
