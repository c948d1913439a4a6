"""Top-K blocks on a parameter's own grid: decided by its global shape, never by how it is sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """``cols`` adjacent blocks of ``numel`` elements each, beginning ``start`` elements into a row interval."""

    start: int
    cols: int
    numel: int
    is_fragment: bool


@dataclass(frozen=True)
class Band:
    """``rows`` consecutive rows of a span that are cut into the same segments.

    ``start`` is counted from the beginning of the span; the rows are ``row_numel`` elements apart.
    """

    start: int
    rows: int
    row_numel: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class BlockGrid:
    """Top-K blocks of one parameter: every row is cut into ``block_numel``-element blocks, the last may be shorter."""

    row_numel: int
    block_numel: int

    @classmethod
    def from_shape(cls, global_shape: Sequence[int], block_size: int) -> BlockGrid:
        """Lay the grid: equal blocks of a multiple of 8 elements where the row length allows it.

        Source: ours; the paper lays blocks over the flattened parameter.
        """
        row_numel = math.prod(global_shape) // global_shape[0]
        fewest = -(-row_numel // block_size)
        for num_blocks in range(fewest, 4 * fewest + 1):
            if row_numel % num_blocks == 0 and (row_numel // num_blocks) % 8 == 0:
                return cls(row_numel, row_numel // num_blocks)
        even_share = -(-row_numel // fewest)
        return cls(row_numel, min(row_numel, -(-even_share // 8) * 8))

    @property
    def blocks_per_row(self) -> int:
        """Blocks in one row of the parameter."""
        return -(-self.row_numel // self.block_numel)

    def block_index(self, position: int) -> int:
        """Number of the block that holds element ``position``, in row-major order."""
        row, column = divmod(position, self.row_numel)
        return row * self.blocks_per_row + column // self.block_numel

    def block_interval(self, position: int) -> tuple[int, int]:
        """First element and end of the whole block that holds element ``position``, in row-major order."""
        row, column = divmod(position, self.row_numel)
        start = column - column % self.block_numel
        return row * self.row_numel + start, row * self.row_numel + min(start + self.block_numel, self.row_numel)

    def segments(self, begin: int, end: int) -> tuple[Segment, ...]:
        """Cut the interval [begin, end) of one row at the block edges; starts are relative to ``begin``."""
        segments = []
        position = begin
        while position < end:
            column = position // self.block_numel
            block_end = min((column + 1) * self.block_numel, self.row_numel)
            if position % self.block_numel or end < block_end:  # a shard edge cuts this block
                stop = min(end, block_end)
                segments.append(Segment(position - begin, 1, stop - position, is_fragment=True))
            else:
                cols = max(1, (end - position) // self.block_numel)  # max: the shorter last block of a row
                numel = min(self.block_numel, block_end - position)
                stop = position + cols * numel
                segments.append(Segment(position - begin, cols, numel, is_fragment=False))
            position = stop
        return tuple(segments)

    def bands(self, start: int, numel: int) -> list[Band]:
        """Cut the interval [start, start + numel) of the parameter into part of a row, whole rows, part of a row."""
        bands = []
        position, end = start, start + numel
        while position < end:
            column = position % self.row_numel
            whole_rows = (end - position) // self.row_numel if column == 0 else 0
            if whole_rows:
                rows, row_end = whole_rows, self.row_numel
            else:
                rows, row_end = 1, min(self.row_numel, column + end - position)
            bands.append(Band(position - start, rows, self.row_numel, self.segments(column, row_end)))
            position += rows * (row_end - column)
        return bands
