"""Whether a tensor is a `DTensor`, asked without importing them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from ..errors import CheckpointMismatchError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def require_plain(state: Tensor, name: str) -> Tensor:
    """For the state of a parameter that is no DTensor.

    Raises:
        CheckpointMismatchError: The state is one.
    """
    if is_dtensor(state):
        raise CheckpointMismatchError(
            f"state of {name!r} is a DTensor with placements {state.placements}, the parameter a "
            "plain tensor. Load it with torch.distributed.checkpoint, which reshards."
        )
    return state


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor."""
    # Importing the module takes a second or more; where nobody has imported it there are no DTensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def describe(tensor: Tensor) -> str:
    """Shape and distribution, for messages."""
    if not is_dtensor(tensor):
        return f"a plain tensor of shape {tuple(tensor.shape)}"
    return f"a DTensor of shape {tuple(tensor.shape)} with placements {tensor.placements} on {tensor.device_mesh}"
