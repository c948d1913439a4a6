"""DDP with sharded state (`MicroAdam(shard_state=...)`): parameters are whole on every rank, a rank steps its rows.

The rows and the state are those of FSDP2 on the same ranks, hence the checkpoint, too. `row_exchange` makes the
parameters whole again after the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Place, Shard
from .collectives import process_rank
from .cuts import row_shard, row_share
from .rows import RowShard


def find_shard(place: Place) -> Shard | None:
    """One span: this rank's rows."""
    tensor, named = place.tensor, place.names.find(place.tensor)
    if place.exchange is None or named is None or tensor.ndim == 0:
        return None  # every rank steps a scalar: one number cannot be shared
    from torch.distributed.tensor import Shard as ShardPlacement

    mesh = place.exchange.mesh(tensor.device.type)
    spans = row_shard(named.fqn, tuple(tensor.shape), mesh.size(), mesh.get_local_rank()).spans
    return ReplicatedShard(tensor, spans, mesh, (ShardPlacement(0),))


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
    def has_final_grad(self) -> bool:
        """See `local.WholeShard`."""
        return process_rank()[1] == 1

    @property
    def is_exchanged(self) -> bool:
        """By a `row_exchange`."""
        return True

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
