"""Shards of whole rows: state tensors are DTensors, one row of state for each row of the parameter.

`torch.distributed.checkpoint` saves and reshards them like a parameter, whichever engine made them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointMismatchError
from ..layout import ShardSpan
from .base import Shard
from .dtensors import describe, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True, eq=False)
class RowShard(Shard):
    """Whole rows of one parameter, uneven, possibly none.

    Attributes:
        mesh: The ranks that share the parameter.
        placements: How they share it: at most one Shard(0).
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def saved_spans(self) -> tuple[ShardSpan, ...]:
        """A DTensor describes the whole parameter."""
        (span,) = self.spans
        return (ShardSpan.whole(span.fqn, span.global_shape),)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those of every axis of the mesh."""
        return [self.mesh.get_group(axis) for axis in range(self.mesh.ndim)]

    @property
    def has_plain_state(self) -> bool:
        """It is kept in DTensors."""
        return False

    def is_other_part(self, state: Any) -> bool:
        """A DTensor that was pickled remembers its mesh, and the place of the rank in it."""
        if not isinstance(state, Tensor) or not is_dtensor(state):
            return False
        if (state.device_mesh, state.placements) != (self.mesh, self.placements):
            return True
        places = [mesh.get_coordinate() or () for mesh in (state.device_mesh, self.mesh)]
        sharded = [axis for axis, placement in enumerate(self.placements) if placement.is_shard()]
        return any(place[axis : axis + 1] != places[1][axis : axis + 1] for place in places for axis in sharded)

    @property
    def sharding_group(self) -> dist.ProcessGroup | None:
        """See `Shard.sharding_group`."""
        axes = [axis for axis, placement in enumerate(self.placements) if placement.is_shard()]
        return self.mesh.get_group(axes[0]) if axes else None

    def wrap(self, local: Tensor) -> Tensor:
        """A DTensor with the mesh, the placements and the parameter's number of rows."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        shape = torch.Size((*self.tensor.shape[:1], *local.shape[1:]))
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        # Not DTensor.from_local: it would move state of parameters that are offloaded to the CPU to the mesh's device.
        spec = DTensorSpec(self.mesh, self.placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    def unwrap(self, state: Tensor) -> Tensor:
        """This rank's rows of a DTensor like that; a plain tensor is taken for these rows."""
        if not is_dtensor(state):
            return state
        if (state.device_mesh, state.placements) != (self.mesh, self.placements):
            raise CheckpointMismatchError(
                f"state of {self.name!r} is {describe(state)}, expected placements {self.placements} on {self.mesh}. "
                "Load it with torch.distributed.checkpoint, which reshards."
            )
        return state.to_local()
