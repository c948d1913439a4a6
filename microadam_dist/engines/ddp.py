"""DDP with sharded state (`MicroAdam(shard_state=...)`): parameters are whole on every rank, a rank steps its rows.

The rows and the state are those of FSDP2 on the same ranks, hence the checkpoint, too. `row_exchange` makes the
parameters whole again after the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import row_shard, row_share
from .base import Shard, Slot
from .rows import RowShard, is_dtensor


def find_shard(slot: Slot) -> Shard | None:
    """One span: this rank's rows."""
    names = [named.fqn for group in slot.constructed for named in group if named.param is slot.tensor]
    if slot.exchange is None or not names:
        return None
    tensor, fqn = slot.tensor, names[0]
    if is_dtensor(tensor) or getattr(tensor, "_fsdp_flattened", False):
        raise UnsupportedLayoutError(
            f"parameter {fqn!r} is sharded by FSDP, and its state with it: remove shard_state, which is for parameters "
            "that are whole on every rank (DDP)."
        )
    if tensor.ndim == 0:
        return None  # every rank steps it: one number cannot be shared
    from torch.distributed.tensor import Shard as ShardPlacement

    mesh = slot.exchange.mesh(tensor.device.type)
    spans = row_shard(fqn, tuple(tensor.shape), mesh.size(), mesh.get_local_rank()).spans
    return ReplicatedShard(tensor, spans, mesh, (ShardPlacement(0),))


def whitelist(optimizer_class: type) -> None:
    """Nothing to do."""


@dataclass(frozen=True, eq=False)
class ReplicatedShard(RowShard):
    """A parameter that is whole on every rank, each of which steps some rows."""

    @property
    def param(self) -> Tensor:
        """The rows this rank steps: (local rows, ...)."""
        return self.rows_of(self.rank)

    @property
    def grad(self) -> Tensor:
        """Their gradient."""
        return super().grad[self.row_slice(self.rank)]

    @property
    def rank(self) -> int:
        """This rank in the mesh."""
        return self.mesh.get_local_rank()

    def rows_of(self, rank: int) -> Tensor:
        """The rows another rank steps; not a copy."""
        return self.tensor.detach()[self.row_slice(rank)]

    def row_slice(self, rank: int) -> slice:
        """Which rows a rank steps."""
        return slice(*row_share(self.tensor.shape[0], self.mesh.size(), rank))
