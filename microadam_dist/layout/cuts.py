"""Ways to cut parameters for ranks, in integers; which engine cuts how is in `engines.cuts`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .spans import ShardSpan


@dataclass(frozen=True)
class FlatShard:
    """One local tensor that holds parts of several parameters: its spans, its length, and the padding at its end."""

    spans: tuple[ShardSpan, ...]
    numel: int
    end_padding: int


def row_share(num_rows: int, world_size: int, rank: int) -> tuple[int, int]:
    """As many rows for every rank, fewer or none for the last ones: first row of a rank, and the one after its last."""
    share = -(-num_rows // world_size)
    first = min(share * rank, num_rows)
    return first, min(first + share, num_rows)


def cut_rows(fqn: str, shape: tuple[int, ...], world_size: int, rank: int) -> FlatShard:
    """Whole rows of one parameter by `row_share`, padded to those of the first rank."""
    rows, row_numel = math.prod(shape[:1]), math.prod(shape[1:])  # a scalar is one row
    first, end = row_share(rows, world_size, rank)
    span = ShardSpan(fqn, shape, first * row_numel, (end - first) * row_numel)
    numel = row_share(rows, world_size, 0)[1] * row_numel
    return FlatShard((span,), numel, end_padding=numel - span.numel)


def cut_together(
    shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int, *, alignment: int = 1, share_multiple: int = 1
) -> FlatShard:
    """Parameters in a row, each beginning at a multiple of ``alignment``, cut into equal parts.

    Args:
        shapes: Name -> shape, in order.
        world_size: Number of parts.
        rank: Which one.
        alignment: In elements.
        share_multiple: The length of a part is a multiple of this.
    """
    begins, total = [], 0
    for shape in shapes.values():
        begins.append(-(-total // alignment) * alignment)
        total = begins[-1] + math.prod(shape)
    share = -(-total // (share_multiple * world_size)) * share_multiple
    shard_start, shard_end = rank * share, (rank + 1) * share
    spans = []
    for (fqn, shape), begin in zip(shapes.items(), begins, strict=True):
        start, end = max(begin, shard_start), min(begin + math.prod(shape), shard_end)
        if start < end:
            spans.append(ShardSpan(fqn, shape, start - begin, end - start, start - shard_start))
    return FlatShard(tuple(spans), share, end_padding=min(share, max(0, shard_end - total)))


def even_share(numel: int, world_size: int) -> int:
    """Elements of one parameter on every rank when it is padded to a multiple of the ranks."""
    return -(-numel // world_size)


def cut_each(shapes: Mapping[str, tuple[int, ...]], world_size: int, rank: int) -> FlatShard:
    """Every parameter by `even_share`, the parts of a rank in a row with their padding."""
    spans, offset = [], 0
    for fqn, shape in shapes.items():
        share = even_share(math.prod(shape), world_size)
        start = min(rank * share, math.prod(shape))
        spans.append(ShardSpan(fqn, shape, start, min(share, math.prod(shape) - start), offset))
        offset += share
    return FlatShard(tuple(spans), offset, end_padding=0)
