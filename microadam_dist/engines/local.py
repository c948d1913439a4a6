"""Whole parameters on one device: a single process, and plain DDP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layout import ShardSpan
from .base import Place, Shard
from .collectives import process_rank


def find_shard(place: Place) -> Shard | None:
    """One span: the whole parameter."""
    named = place.names.find(place.tensor)
    if named is None:
        return None
    return WholeShard(place.tensor, (ShardSpan.whole(named.fqn, tuple(place.tensor.shape)),))


@dataclass(frozen=True, eq=False)
class WholeShard(Shard):
    """A parameter that is whole on this rank, and stepped by it."""

    @property
    def has_final_grad(self) -> bool:
        """Among several ranks somebody reduces it: DDP, or by hand."""
        return process_rank()[1] == 1


def has_ddp(model: nn.Module) -> bool:
    """Whether DDP reduces the gradients of a part of the model."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())
