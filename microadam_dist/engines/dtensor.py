"""FSDP2 (`fully_shard`) and HSDP: a parameter is a DTensor that holds whole rows, uneven, possibly none.

State tensors become DTensors with the parameter's mesh and placements, one row of state for each row of the parameter:
`torch.distributed.checkpoint` saves and reshards them like the parameter itself.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointMismatchError, UnsupportedLayoutError
from ..layout import ShardSpan
from .base import Shard, Slot

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def find_shard(slot: Slot) -> Shard | None:
    """One span of whole rows of the global shape."""
    if not _is_dtensor(slot.tensor):
        return None
    fqn, shape = _name(slot), tuple(slot.tensor.shape)
    first, end = _rows(fqn, slot.tensor)
    row_numel = math.prod(shape[1:])
    span = ShardSpan(fqn, shape, first * row_numel, (end - first) * row_numel)
    return DTensorShard(slot.tensor, (span,))


def whitelist(optimizer_class: type) -> None:
    """Nothing to do."""


@dataclass(frozen=True, eq=False)
class DTensorShard(Shard):
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
                f"the gradient of parameter {self.name!r} is {_describe(grad)}, the parameter "
                f"{_describe(self.tensor)}. Reduce it to the same placements before the step, as fully_shard does."
            )
        return grad.to_local()

    @property
    def has_final_grad(self) -> bool:
        """FSDP2 reduces a gradient before it shows it."""
        return True

    @property
    def may_be_probed(self) -> bool:
        """`torch.distributed.checkpoint` does; the ranks agree through `groups`."""
        return True

    @property
    def saved_spans(self) -> tuple[ShardSpan, ...]:
        """A DTensor describes the whole parameter."""
        (span,) = self.spans
        return (ShardSpan(span.fqn, span.global_shape, start=0, numel=span.global_numel),)

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """Those of every axis of the mesh."""
        mesh = self.tensor.device_mesh
        return [mesh.get_group(axis) for axis in range(mesh.ndim)]

    def wrap(self, local: Tensor) -> Tensor:
        """A DTensor with the parameter's mesh, placements and number of rows."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        shape = torch.Size((*self.tensor.shape[:1], *local.shape[1:]))
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        # Not DTensor.from_local: it would move state of parameters that are offloaded to the CPU to the mesh's device.
        spec = DTensorSpec(
            self.tensor.device_mesh, self.tensor.placements, tensor_meta=TensorMeta(shape, stride, local.dtype)
        )
        return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]

    def unwrap(self, state: Tensor) -> Tensor:
        """This rank's rows of a DTensor like the parameter; a plain tensor is taken for these rows."""
        if not _is_dtensor(state):
            return state
        if not _is_distributed_like(state, self.tensor):
            raise CheckpointMismatchError(
                f"state of {self.name!r} is {_describe(state)}, the parameter {_describe(self.tensor)}. "
                "Load it with torch.distributed.checkpoint, which reshards."
            )
        return state.to_local()


def _rows(fqn: str, param: DTensor) -> tuple[int, int]:
    """First row this rank holds, and the one after the last."""
    from torch.distributed import tensor as dtensor

    sharded = {axis: p for axis, p in enumerate(param.placements) if not isinstance(p, dtensor.Replicate)}
    # Not isinstance: _StridedShard has been a subclass of Shard, and its rows are not consecutive.
    if len(sharded) > 1 or any(type(p) is not dtensor.Shard or p.dim != 0 for p in sharded.values()):
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is {_describe(param)}; MicroAdam needs whole rows: one Shard(0), and Replicate on all "
            "other axes of the mesh. Use fully_shard without a shard_placement_fn that shards another dimension, and "
            "without tensor parallelism."
        )
    first, end = 0, math.prod(param.shape[:1])  # a scalar is one row
    for axis in sharded:
        share = -(-end // param.device_mesh.size(axis))
        first = min(share * param.device_mesh.get_local_rank(axis), end)
        end = min(first + share, end)
    held = math.prod(param.to_local().shape[:1])
    if held != end - first:
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is {_describe(param)}, of which this rank should hold rows {first} to {end}, but it "
            f"holds {held} rows. This version of torch may shard in another way than the tested one (2.13)."
        )
    return first, end


def _name(slot: Slot) -> str:
    """The name the constructor was given; for a parameter that was sharded afterwards (Accelerate) by its position."""
    for group in slot.constructed:
        for named in group:
            if named.param is slot.tensor:
                return named.fqn
    group = slot.constructed[slot.group]
    if len(group) == slot.group_size and group[slot.position].shape == tuple(slot.tensor.shape):
        return group[slot.position].fqn
    raise UnsupportedLayoutError(
        f"param group {slot.group} holds, at position {slot.position}, a DTensor of shape {tuple(slot.tensor.shape)} "
        "that is not the parameter MicroAdam was constructed with there. Construct it after fully_shard, or let "
        "Accelerate prepare model and optimizer in one call."
    )


def _describe(tensor: Tensor) -> str:
    if not _is_dtensor(tensor):
        return f"a plain tensor of shape {tuple(tensor.shape)}"
    return f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} on {tensor.device_mesh}"


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    # Importing the module takes a second or more; where nobody has imported it there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _is_distributed_like(tensor: Tensor, param: DTensor) -> TypeGuard[DTensor]:
    return _is_dtensor(tensor) and (tensor.device_mesh, tensor.placements) == (param.device_mesh, param.placements)
