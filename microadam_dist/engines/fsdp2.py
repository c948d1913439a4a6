"""FSDP2 (`fully_shard`) and HSDP: a parameter is a DTensor that holds whole rows, uneven, possibly none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import ShardSpan
from .base import Place, Shard
from .cuts import row_share
from .dtensors import describe, is_dtensor
from .rows import RowShard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def find_shard(place: Place) -> Shard | None:
    """One span of whole rows of the global shape."""
    tensor = place.tensor
    if not is_dtensor(tensor):
        return None
    fqn, shape = _name(place), tuple(tensor.shape)
    place.refuse_shard_state(fqn)
    first, end = _rows(fqn, tensor)
    row_numel = math.prod(shape[1:])
    span = ShardSpan(fqn, shape, first * row_numel, (end - first) * row_numel)
    return DTensorShard(tensor, (span,), tensor.device_mesh, tensor.placements)


@dataclass(frozen=True, eq=False)
class DTensorShard(RowShard):
    """A parameter of FSDP2."""

    tensor: DTensor

    @property
    def param(self) -> Tensor:
        """The rows this rank holds: (local rows, ...)."""
        return self.tensor.to_local().detach()

    @property
    def grad(self) -> Tensor:
        """Their gradient."""
        grad = super().grad
        if not _is_distributed_like(grad, self.tensor):
            raise UnsupportedLayoutError(
                f"the gradient of parameter {self.name!r} is {describe(grad)}, the parameter "
                f"{describe(self.tensor)}. Reduce it to the same placements before the step, as fully_shard does."
            )
        return grad.to_local()

    @property
    def has_final_grad(self) -> bool:
        """FSDP2 reduces a gradient before it shows it."""
        return True


def _rows(fqn: str, param: DTensor) -> tuple[int, int]:
    """First row this rank holds, and the one after the last."""
    from torch.distributed import tensor as dtensor

    sharded = {axis: p for axis, p in enumerate(param.placements) if not isinstance(p, dtensor.Replicate)}
    # Not isinstance: _StridedShard has been a subclass of Shard, and its rows are not consecutive.
    if len(sharded) > 1 or any(type(p) is not dtensor.Shard or p.dim != 0 for p in sharded.values()):
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is {describe(param)}; MicroAdam needs whole rows: one Shard(0), and Replicate on all "
            "other axes of the mesh. Use fully_shard without a shard_placement_fn that shards another dimension, and "
            "without tensor parallelism."
        )
    first, end = 0, math.prod(param.shape[:1])  # a scalar is one row
    for axis in sharded:
        first, end = row_share(end, param.device_mesh.size(axis), param.device_mesh.get_local_rank(axis))
    held = math.prod(param.to_local().shape[:1])
    if held != end - first:
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is {describe(param)}, of which this rank should hold rows {first} to {end}, but it "
            f"holds {held} rows. This version of torch may shard in another way than the tested one (2.13)."
        )
    return first, end


def _name(place: Place) -> str:
    """The name the constructor was given; for a parameter that was sharded afterwards (Accelerate) by its position."""
    named, group = place.names.find(place.tensor), place.names.groups[place.group]
    if named is not None:
        return named.fqn
    if len(group) == place.group_size and group[place.position].shape == tuple(place.tensor.shape):
        return group[place.position].fqn
    raise UnsupportedLayoutError(
        f"param group {place.group} holds, at position {place.position}, a DTensor of shape "
        f"{tuple(place.tensor.shape)} that is not the parameter MicroAdam was constructed with there. Construct it "
        "after fully_shard, or let Accelerate prepare model and optimizer in one call."
    )


def _is_distributed_like(tensor: Tensor, param: DTensor) -> TypeGuard[DTensor]:
    return is_dtensor(tensor) and (tensor.device_mesh, tensor.placements) == (param.device_mesh, param.placements)
