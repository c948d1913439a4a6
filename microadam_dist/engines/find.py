"""Which engine a tensor belongs to."""

from __future__ import annotations

from ..errors import UnsupportedLayoutError
from . import deepspeed, fsdp1, fsdp2, local, replicated
from .base import Adapter, Place, Shard

# Asked in this order; none of them imports its engine before it is used.
_ADAPTERS: tuple[Adapter, ...] = (fsdp2, fsdp1, replicated, local, deepspeed)


def introduce(optimizer_class: type) -> None:
    """Make engines that keep a list of optimizers accept the class; called when one is constructed."""
    deepspeed.whitelist(optimizer_class)


def find_shard(place: Place) -> Shard:
    """What the tensor in ``place`` holds, from the engine it belongs to.

    Raises:
        UnsupportedLayoutError: No engine knows the tensor, or its engine shards it in a way that has no spans.
    """
    for adapter in _ADAPTERS:
        shard = adapter.find_shard(place)
        if shard is not None:
            return shard
    raise UnsupportedLayoutError(
        f"param group {place.group} holds a tensor of shape {tuple(place.tensor.shape)} at position {place.position} "
        "that is neither a parameter the optimizer was constructed with nor a shard of a known engine. Construct "
        "MicroAdam with the model's own parameters, and let the engine (DeepSpeed, FSDP2) replace them."
    )
