"""How engines cut parameters, known without running them: for the planner, and to write a checkpoint for other ranks.

What a rank really holds is read from the engine by its adapter. Standard library only. Facts of torch 2.13 and of
DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..layout import FlatShard, cut_each, cut_rows, cut_together

# FSDP2, and DDP with sharded state: whole rows, fewer or none on the last ranks, whose tensors are padded.
row_shard = cut_rows

# ZeRO-3: every parameter of a sub-group padded to a multiple of the ranks and cut into equal parts.
zero3_shard = cut_each


def zero12_shard(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int) -> FlatShard:
    """ZeRO-1 and 2: the parameters of a group in a row, padded to a multiple of 2 x ranks, in equal parts."""
    return cut_together(shapes, world_size, rank, share_multiple=2)


def fsdp1_shard(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int, *, alignment: int) -> FlatShard:
    """FSDP1 with ``use_orig_params``: the parameters of a unit in a row, each beginning at 16 bytes, in equal parts.

    Args:
        shapes: Name -> shape of the parameters of one unit, in the order of its modules.
        world_size: Ranks that share the unit.
        rank: Which one.
        alignment: Elements in 16 bytes of the dtype in which the unit computes.
    """
    return cut_together(shapes, world_size, rank, alignment=alignment)
