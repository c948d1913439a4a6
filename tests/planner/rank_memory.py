"""What the planner says each rank holds, as one number for each kind of tensor, to compare with what is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

from microadam_dist.config import MicroAdamConfig
from microadam_dist.planner.engines import Engine, Precision, rank_shards
from microadam_dist.planner.memory import Optimizer, state_bytes
from microadam_dist.planner.shapes import Shapes


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank while the optimizer steps.

    Attributes:
        weights: The module's weights.
        gradients: The gradients handed to the optimizer.
        master: Copies of the weights that the optimizer updates in their place.
        optimizer: Its state.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int


def rank_memory(
    engine: Engine, units: Sequence[Shapes], config: MicroAdamConfig, world_size: int, rank: int, precision: Precision
) -> RankMemory:
    """What an engine and `MicroAdam` hold on one rank, to the byte; see `rank_shards` for the arguments."""
    shards = rank_shards(engine, units, world_size, rank, compute_bytes=precision.compute)
    stepped_numel = sum(shards.stepped_numels)
    return RankMemory(
        weights=precision.weight * shards.weight_numel,
        gradients=precision.stepped * shards.grad_numel,
        master=precision.master * stepped_numel,
        optimizer=state_bytes(Optimizer.microadam, shards, config, precision),
    )
