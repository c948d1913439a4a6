"""Where everything lies: spans of parameters, Top-K blocks on their grids, state sizes and offsets.

All offset, size and byte arithmetic of the package is here, in plain integers. Standard library only, so that the
planner predicts with the very code that allocates.

    parameter (global)   rows x row_numel, row-major                       BlockGrid
      span               a contiguous interval of it that a rank holds     ShardSpan
        band             consecutive rows of the span cut in the same way  (row intervals; at most 3 a span)
          run            rows x cols blocks of one length                  BlockRun
            block        Top-K unit, never crosses a row of the parameter; cut by a shard edge it is a fragment
              bucket     elements that share one quantization range, never crosses a block
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .config import MicroAdamConfig
from .errors import UnsupportedLayoutError

# Parameters below these global sizes take the dense path (AdamW with fp32 moments).
MIN_SPARSE_ROW_NUMEL = 64
MIN_SPARSE_NUMEL = 4096

DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}
INDEX_BYTES = 2  # 16-bit, stored as uint8 because neither gloo nor NCCL carries int16


@dataclass(frozen=True)
class ShardSpan:
    """A contiguous interval of one named parameter, in row-major element order, inside a local tensor.

    Args:
        fqn: Name of the parameter, or its position in the param groups when it was given without a name.
        global_shape: Shape of the whole parameter.
        start: First element of the interval, counted in the whole parameter.
        numel: Length of the interval; may be 0.
        offset: Where the interval begins in the local tensor, in elements.
    """

    fqn: str
    global_shape: tuple[int, ...]
    start: int
    numel: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.numel < 0 or self.offset < 0 or self.start + self.numel > self.global_numel:
            raise UnsupportedLayoutError(f"{self} does not lie inside the parameter.")

    @property
    def global_numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.global_shape)

    @property
    def is_dense(self) -> bool:
        """Whether the parameter takes the dense path; decided by its global shape, so the same on every rank."""
        if len(self.global_shape) < 2 or self.global_numel < MIN_SPARSE_NUMEL:
            return True
        return self.global_numel // self.global_shape[0] < MIN_SPARSE_ROW_NUMEL


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


@dataclass(frozen=True)
class Extent:
    """Where a run's blocks lie in a flat tensor: block (row, col) begins at ``start + row * row_stride + col * size``.

    ``size`` is what one block takes there, in elements of that tensor.
    """

    start: int
    row_stride: int
    size: int


@dataclass(frozen=True)
class BlockRun:
    """``rows`` x ``cols`` Top-K blocks of ``numel`` elements, ``num_kept`` of which are kept in each.

    ``elements`` locates them in the local tensor, the others in the state tensors (``kept`` in units of one slot:
    the window tensors hold ``window_size`` slots a block, one after the other).
    """

    rows: int
    cols: int
    numel: int
    num_kept: int
    is_fragment: bool
    elements: Extent
    codes: Extent
    buckets: Extent
    kept: Extent

    @property
    def num_blocks(self) -> int:
        """Blocks of the run."""
        return self.rows * self.cols


@dataclass(frozen=True)
class DenseRun:
    """An interval on the dense path: element offset in the local tensor and in the moment tensors."""

    start: int
    numel: int
    state_start: int


@dataclass(frozen=True)
class StateLayout:
    """State of one local tensor: the sizes of its flat state tensors and where each block lies in them.

    Blocks follow each other in the order of the spans, inside a span in row-major order.
    """

    spans: tuple[ShardSpan, ...]
    config: MicroAdamConfig

    @property
    def has_window(self) -> bool:
        """A window of 1 is overwritten before it is read again, so it is not stored."""
        return self.config.window_size > 1

    def block_code_bytes(self, numel: int) -> int:
        """Bytes of the codes of one block; a block begins at a byte."""
        return -(-numel * self.config.ef_bits // 8)

    def block_num_buckets(self, numel: int) -> int:
        """Buckets of one block of ``numel`` elements."""
        return -(-numel // self.config.bucket_size) if self.config.ef_bits else 0

    @cached_property
    def runs(self) -> tuple[BlockRun, ...]:
        """All Top-K blocks, in state order."""
        return tuple(self._lay_runs())

    def _lay_runs(self) -> Iterator[BlockRun]:
        codes = buckets = kept = 0  # what the bands before take
        for span in self.spans:
            if span.is_dense or span.numel == 0:
                continue
            for band in BlockGrid.from_shape(span.global_shape, self.config.block_size).bands(span.start, span.numel):
                sizes = [
                    (
                        self.block_code_bytes(segment.numel),
                        self.block_num_buckets(segment.numel),
                        self.config.num_kept(segment.numel),
                    )
                    for segment in band.segments
                ]
                per_row = [
                    sum(segment.cols * size[i] for segment, size in zip(band.segments, sizes, strict=True))
                    for i in range(3)
                ]
                in_row = [0, 0, 0]
                for segment, size in zip(band.segments, sizes, strict=True):
                    yield BlockRun(
                        rows=band.rows,
                        cols=segment.cols,
                        numel=segment.numel,
                        num_kept=size[2],
                        is_fragment=segment.is_fragment,
                        elements=Extent(span.offset + band.start + segment.start, band.row_numel, segment.numel),
                        codes=Extent(codes + in_row[0], per_row[0], size[0]),
                        buckets=Extent(buckets + in_row[1], per_row[1], size[1]),
                        kept=Extent(kept + in_row[2], per_row[2], size[2]),
                    )
                    in_row = [done + segment.cols * s for done, s in zip(in_row, size, strict=True)]
                codes += band.rows * per_row[0]
                buckets += band.rows * per_row[1]
                kept += band.rows * per_row[2]

    @cached_property
    def dense_runs(self) -> tuple[DenseRun, ...]:
        """The intervals on the dense path, in state order."""
        runs = []
        state_start = 0
        for span in self.spans:
            if span.is_dense:
                runs.append(DenseRun(span.offset, span.numel, state_start))
                state_start += span.numel
        return tuple(runs)

    @property
    def sparse_numel(self) -> int:
        """Elements on the Top-K path."""
        return sum(span.numel for span in self.spans if not span.is_dense)

    @property
    def dense_numel(self) -> int:
        """Elements on the dense path."""
        return sum(span.numel for span in self.spans if span.is_dense)

    @property
    def num_fragments(self) -> int:
        """Blocks cut by a shard edge: the only ones whose arithmetic depends on the number of ranks."""
        return sum(run.num_blocks for run in self.runs if run.is_fragment)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """Name -> (dtype, number of elements) of every flat state tensor; a path without parameters has none."""
        tensors: dict[str, tuple[str, int]] = {}
        if any(not span.is_dense for span in self.spans):
            if self.config.ef_bits:
                num_buckets = sum(run.num_blocks * run.buckets.size for run in self.runs)
                tensors["codes"] = ("uint8", sum(run.num_blocks * run.codes.size for run in self.runs))
                tensors["bucket_lo"] = ("bfloat16", num_buckets)
                tensors["bucket_hi"] = ("bfloat16", num_buckets)
            if self.has_window:
                stored = self.config.window_size * sum(run.num_blocks * run.num_kept for run in self.runs)
                tensors["indices"] = ("uint8", INDEX_BYTES * stored)
                tensors["values"] = ("bfloat16", stored)
        if any(span.is_dense for span in self.spans):
            tensors["exp_avg"] = tensors["exp_avg_sq"] = ("float32", self.dense_numel)
        return tensors

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the error feedback and the window."""
        return sum(
            numel * DTYPE_BYTES[dtype] for name, (dtype, numel) in self.tensors.items() if not name.startswith("exp_")
        )

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense path's moments."""
        return sum(
            numel * DTYPE_BYTES[dtype] for name, (dtype, numel) in self.tensors.items() if name.startswith("exp_")
        )
