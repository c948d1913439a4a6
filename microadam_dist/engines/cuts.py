"""How engines cut parameters, known without running them: for the planner, and to write a checkpoint for other ranks.

What a rank really holds is read from the engine by its adapter. Standard library only. Facts of torch 2.13 and of
DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..layout import ShardSpan


def row_share(num_rows: int, world_size: int, rank: int) -> tuple[int, int]:
    """Shard(0) of a DTensor: first row of a rank, and the one after its last."""
    share = -(-num_rows // world_size)
    first = min(share * rank, num_rows)
    return first, min(first + share, num_rows)


@dataclass(frozen=True)
class FlatShard:
    """One local tensor that holds parts of several parameters: its spans, its length, and the padding at its end."""

    spans: tuple[ShardSpan, ...]
    numel: int
    end_padding: int


def share_spans(
    placed: Iterable[tuple[str, tuple[int, ...], int]], share_start: int, share_end: int
) -> Iterator[ShardSpan]:
    """What the elements [share_start, share_end) of a buffer hold, in which parameters (name, shape, begin) lie."""
    for fqn, shape, begin in placed:
        start, end = max(begin, share_start), min(begin + math.prod(shape), share_end)
        if start < end:
            yield ShardSpan(fqn, shape, start - begin, end - start, start - share_start)


def zero12_shard(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int) -> FlatShard:
    """ZeRO-1 and 2: the parameters of a group in a row, padded to a multiple of 2 x ranks, in equal parts."""
    return _flat_shard(shapes, world_size, rank, share_multiple=2)


def fsdp1_shard(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int, *, alignment: int) -> FlatShard:
    """FSDP1 with ``use_orig_params``: the parameters of a unit in a row, each beginning at 16 bytes, in equal parts.

    Args:
        shapes: Name -> shape of the parameters of one unit, in the order of its modules.
        world_size: Ranks that share the unit.
        rank: Which one.
        alignment: Elements in 16 bytes of the dtype in which the unit computes.
    """
    return _flat_shard(shapes, world_size, rank, alignment=alignment)


def _flat_shard(
    shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int, *, alignment: int = 1, share_multiple: int = 1
) -> FlatShard:
    begins, total = [], 0
    for shape in shapes.values():
        begins.append(-(-total // alignment) * alignment)
        total = begins[-1] + math.prod(shape)
    share = -(-total // (share_multiple * world_size)) * share_multiple
    shard_start, shard_end = rank * share, (rank + 1) * share
    placed = ((fqn, shape, begin) for (fqn, shape), begin in zip(shapes.items(), begins, strict=True))
    spans = share_spans(placed, shard_start, shard_end)
    return FlatShard(tuple(spans), share, end_padding=min(share, max(0, shard_end - total)))


def row_shard(fqn: str, shape: tuple[int, ...], world_size: int, rank: int) -> FlatShard:
    """FSDP2: as many whole rows on every rank, fewer or none on the last ones, whose tensors are padded."""
    rows, row_numel = math.prod(shape[:1]), math.prod(shape[1:])  # a scalar is one row
    first, end = row_share(rows, world_size, rank)
    span = ShardSpan(fqn, shape, first * row_numel, (end - first) * row_numel)
    numel = row_share(rows, world_size, 0)[1] * row_numel
    return FlatShard((span,), numel, end_padding=numel - span.numel)


def zero3_share(shape: Sequence[int], world_size: int) -> int:
    """ZeRO-3: elements of one parameter on every rank, padding included."""
    return -(-math.prod(shape) // world_size)


def zero3_shard(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int) -> FlatShard:
    """ZeRO-3: every parameter padded to a multiple of the ranks and cut into equal parts."""
    spans, offset = [], 0
    for fqn, shape in shapes.items():
        share = zero3_share(shape, world_size)
        start = min(rank * share, math.prod(shape))
        spans.append(ShardSpan(fqn, shape, start, min(share, math.prod(shape) - start), offset))
        offset += share
    return FlatShard(tuple(spans), offset, end_padding=0)
