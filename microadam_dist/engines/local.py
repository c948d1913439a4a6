"""Whole parameters on one device: single process, DDP, and engines that keep one master copy of each parameter."""

from __future__ import annotations

from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import ShardSpan
from .base import Shard, Slot


def find_shard(slot: Slot) -> Shard | None:
    """One span: the whole parameter."""
    for group in slot.constructed:
        for named in group:
            if named.param is slot.tensor:
                _refuse_fsdp1(named.fqn, slot.tensor)
                return Shard(slot.tensor, (_whole(named.fqn, slot.tensor),))
    return None


def whitelist(optimizer_class: type) -> None:
    """Nothing to do."""


def _whole(fqn: str, tensor: Tensor) -> ShardSpan:
    return ShardSpan(fqn, tuple(tensor.shape), start=0, numel=tensor.numel())


def _refuse_fsdp1(fqn: str, tensor: Tensor) -> None:
    # It looks like a whole parameter, and would get the wrong grid.
    if getattr(tensor, "_fsdp_flattened", False):
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is a view into a flat parameter of FullyShardedDataParallel, whose state MicroAdam "
            "cannot shard yet. Use fully_shard (FSDP2), DeepSpeed ZeRO or DDP."
        )
