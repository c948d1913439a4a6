"""FSDP1 (`FullyShardedDataParallel`, ``use_orig_params=True``): a parameter is a 1-D view of any interval of itself.

FSDP1 lays the parameters of a module one after the other into a flat tensor and cuts it into equal parts, so that shard
edges fall inside blocks. Its own optimizer checkpoints hold tensors of the parameter's shape and dtype only: the state
of MicroAdam is saved apart from them, by `save_sharded`.
"""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import ShardSpan
from .base import Place, Shard


def find_shard(place: Place) -> Shard | None:
    """One span: the interval of the parameter that is in this rank's part of the flat tensor, possibly empty."""
    tensor = place.tensor
    if getattr(tensor, "_is_flat_param", False):
        raise UnsupportedLayoutError(
            "the optimizer got a flat parameter of FullyShardedDataParallel, in which the shapes of the model's "
            "parameters are lost, and with them their blocks. Wrap the model with use_orig_params=True."
        )
    if not getattr(tensor, "_fsdp_flattened", False):
        return None
    named, found = place.names.find(tensor), _find_handle(tensor)
    if named is None or found is None:
        raise UnsupportedLayoutError(
            f"param group {place.group} holds, at position {place.position}, a parameter that a "
            "FullyShardedDataParallel module has flattened and that is not among those MicroAdam was constructed with, "
            "or whose module is gone."
        )
    place.refuse_shard_state(named.fqn)
    handle, index = found
    span = _span(named.fqn, handle.flat_param, index)
    return FlatViewShard(tensor, (span,), handle.process_group, is_cut=handle.uses_sharded_strategy)


@dataclass(frozen=True, eq=False)
class FlatViewShard(Shard):
    """A parameter of FSDP1.

    Attributes:
        ranks: Those among which it is sharded.
        is_cut: False for NO_SHARD, which leaves it whole on all of them.
    """

    ranks: dist.ProcessGroup
    is_cut: bool

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """See `Shard.groups`."""
        return [self.ranks]

    @property
    def sharding_group(self) -> dist.ProcessGroup | None:
        """See `Shard.sharding_group`."""
        return self.ranks if self.is_cut else None

    @property
    def is_saved_apart(self) -> bool:
        """A state dict that FSDP1 can save has no room for the state."""
        return True


def _span(fqn: str, flat_param: Any, index: int) -> ShardSpan:
    for name, shape, is_contiguous in zip(flat_param._fqns, flat_param._shapes, flat_param._contiguities, strict=True):
        if not is_contiguous:  # asked of all, so that ranks that hold none of it raise, too
            raise UnsupportedLayoutError(
                f"parameter {name!r} of shape {tuple(shape)} is not row-major in memory, and FSDP1 flattens it in that "
                "order: make it contiguous before wrapping the model, or use fully_shard (FSDP2)."
            )
    info = flat_param._shard_param_infos[index]
    start, numel = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
    return ShardSpan(fqn, tuple(flat_param._shapes[index]), start, numel)


# id of a parameter -> the handle of its flat parameter, and the parameter's position there.
_handles: dict[int, tuple[weakref.ref[Any], int]] = {}


def _find_handle(param: Tensor) -> tuple[Any, int] | None:
    """A parameter does not know the flat parameter it is a view of; the modules of FSDP do."""
    for _ in range(2):
        reference, index = _handles.get(id(param), (lambda: None, 0))
        handle = reference()
        if handle is not None and handle.flat_param._params[index] is param:
            return handle, index
        _index_modules()
    return None


def _index_modules() -> None:
    fsdp = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
    _handles.clear()
    classes = _with_subclasses(fsdp)  # by identity: issubclass takes long for all the objects of a process
    for module in [o for o in gc.get_objects() if id(type(o)) in classes]:
        handle = module._handle
        if handle is not None and handle.flat_param._params is not None:
            reference = weakref.ref(handle)
            _handles.update({id(param): (reference, i) for i, param in enumerate(handle.flat_param._params)})


def _with_subclasses(cls: type) -> set[int]:
    return {id(cls)}.union(*map(_with_subclasses, cls.__subclasses__()))
