"""Whole parameters on one device: single process, DDP, and engines that keep one master copy of each parameter."""

from __future__ import annotations

from torch import Tensor

from ..layout import ShardSpan
from .base import Shard, Slot


def find_shard(slot: Slot) -> Shard | None:
    """One span: the whole parameter."""
    for group in slot.constructed:
        for named in group:
            if named.param is slot.tensor:
                return Shard(slot.tensor, (_whole(named.fqn, slot.tensor),))
    return None


def whitelist(optimizer_class: type) -> None:
    """Nothing to do."""


def _whole(fqn: str, tensor: Tensor) -> ShardSpan:
    return ShardSpan(fqn, tuple(tensor.shape), start=0, numel=tensor.numel())
