"""State of one local tensor: which blocks it has, and where each lies in the flat state tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..config import MicroAdamConfig
from .grid import Band, BlockGrid
from .spans import ShardSpan

DTYPE_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}
SPARSE_DTYPES = dict.fromkeys(("codes", "indices"), "uint8") | dict.fromkeys(
    ("bucket_lo", "bucket_hi", "bucket_scale", "values", "scales"), "bfloat16"
)
# A bucket has a range, or where codes have at most MAX_SCALED_BITS one scale.
ERROR_TENSORS = ("codes", "bucket_lo", "bucket_hi", "bucket_scale")
MAX_SCALED_BITS = 2
WINDOW_TENSORS = ("indices", "values", "scales")
DENSE_TENSORS = ("exp_avg", "exp_avg_sq")
# Indices are stored as uint8 because neither gloo nor NCCL carries int16.
INDEX_BITS, PACKED_INDEX_BITS = 16, 12

# Blocks of each parameter that diagnostics look at: one in 97, at least 7.
SAMPLED_ONE_IN, MIN_SAMPLED_BLOCKS = 97, 7


class TernaryGroup(NamedTuple):
    """Three-level codes that are packed together: byte i holds those of elements i, i + width, i + 2 width, ...

    Attributes:
        start: First element, in its block.
        numel: Elements.
        first_byte: Of the block's codes.
        width: Bytes; a multiple of 8, so that eight neighbours that begin at a multiple of 8 have the same digit.
    """

    start: int
    numel: int
    first_byte: int
    width: int


TERNARY_GROUP = 512
CODES_PER_BYTE = 5  # of three levels: 3**5 = 243


def ternary_groups(numel: int) -> Iterator[TernaryGroup]:
    """The groups of a block of ``numel`` elements: of `TERNARY_GROUP`, the last one shorter."""
    first_byte = 0
    for start in range(0, numel, TERNARY_GROUP):
        length = min(TERNARY_GROUP, numel - start)
        width = 8 * -(-length // (8 * CODES_PER_BYTE))
        yield TernaryGroup(start, length, first_byte, width)
        first_byte += width


def num_levels(bits: float) -> int:
    """The largest error-feedback code; 0: there are none."""
    return 2 if bits == 1.6 else 2 ** int(bits) - 1


def code_bytes(numel: int, bits: float) -> int:
    """Bytes of the error-feedback codes of one block."""
    if bits == 1.6:
        return sum(group.width for group in ternary_groups(numel))
    return -(-numel * int(bits) // 8)


class StateSize(NamedTuple):
    """State elements of some blocks, or of as many as lie before some block.

    Attributes:
        codes: Bytes of error-feedback codes.
        buckets: Their ranges or scales.
        indices, values, scales: Of one slot of the window: bytes of the indices, values, and scales of the values. All
            slots of a block lie one after the other.
    """

    codes: int = 0
    buckets: int = 0
    indices: int = 0
    values: int = 0
    scales: int = 0

    def plus(self, other: StateSize, times: int = 1) -> StateSize:
        """``self + times * other``."""
        return StateSize(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Extent:
    """Where a run's blocks lie in a flat tensor: block (row, col) begins at ``start + row * row_stride + col * size``.

    ``size`` is what one block takes there, in elements of that tensor.
    """

    start: int
    row_stride: int
    size: int

    def is_multiple_of(self, numel: int) -> bool:
        """Whether every block begins at a multiple of ``numel`` elements."""
        return all(x % numel == 0 for x in (self.start, self.row_stride, self.size))


@dataclass(frozen=True)
class BlockRun:
    """``rows`` x ``cols`` Top-K blocks of a span, of ``numel`` elements, ``num_kept`` of which are kept in each.

    ``elements`` locates them in the local tensor, the others in the state tensors as `StateSize` counts them.
    """

    span_index: int
    rows: int
    cols: int
    numel: int
    num_kept: int
    is_fragment: bool
    elements: Extent
    codes: Extent
    buckets: Extent
    indices: Extent
    values: Extent
    scales: Extent

    @property
    def num_blocks(self) -> int:
        """Blocks of the run."""
        return self.rows * self.cols

    @property
    def is_gapless(self) -> bool:
        """Whether the blocks follow each other in all tensors, from the end of a row to the next one."""
        return all(extent.row_stride == self.cols * extent.size for extent in self.extents)

    @property
    def extents(self) -> tuple[Extent, ...]:
        """All of them, in the order in which the kernels' tables have them."""
        return self.elements, self.codes, self.buckets, self.indices, self.values, self.scales


class SampledRun(NamedTuple):
    """Some blocks of a run: (rows[i], cols[i])."""

    run: BlockRun
    rows: list[int]
    cols: list[int]


@dataclass(frozen=True)
class DenseRun:
    """An interval on the dense path: element offset in the local tensor and in the moment tensors."""

    span_index: int
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

    def block_state_size(self, numel: int) -> StateSize:
        """What one block of ``numel`` elements takes; its codes begin at a byte."""
        bits, packed = self.config.ef_bits, self.config.packed_window
        num_buckets = -(-numel // self.config.bucket_size) if bits else 0
        size = StateSize(code_bytes(numel, bits), num_buckets)
        if not self.has_window:
            return size
        num_kept = self.config.num_kept(numel)
        index_bits = PACKED_INDEX_BITS if packed else INDEX_BITS
        return size._replace(indices=-(-num_kept * index_bits // 8), values=num_kept, scales=int(packed))

    def grid(self, span: ShardSpan) -> BlockGrid:
        """The block grid of the parameter ``span`` belongs to."""
        return BlockGrid.from_shape(span.global_shape, self.config.block_size)

    def state_offset(self, span_index: int, position: int) -> StateSize:
        """Where the state of the block (or fragment) that begins at element ``position`` of the parameter begins.

        Args:
            span_index: Which span of this layout; on the Top-K path.
            position: Its start, its end or a block edge inside it, counted in the whole parameter.
        """
        span = self.spans[span_index]
        return self._span_offsets[span_index].plus(self._interval_size(span, position - span.start))

    def state_slices(self, span_index: int, start: int, end: int) -> dict[str, slice]:
        """The part of every state tensor of the Top-K path that belongs to the elements [start, end) of a parameter.

        Args:
            span_index: Which span of this layout; on the Top-K path.
            start, end: Block edges inside the span, or its ends, counted in the whole parameter.
        """
        first, last = (self._sparse_numels(self.state_offset(span_index, position)) for position in (start, end))
        return {name: slice(first[name], last[name]) for name in first}

    @cached_property
    def _span_offsets(self) -> list[StateSize]:
        offsets = [StateSize()]
        for span in self.spans:
            offsets.append(offsets[-1].plus(self._interval_size(span, span.numel)))
        return offsets

    def _interval_size(self, span: ShardSpan, numel: int) -> StateSize:
        """What the first ``numel`` elements of a span take."""
        size = StateSize()
        if not span.is_dense:
            for band in self.grid(span).bands(span.start, numel):
                size = size.plus(self._row_size(band), band.rows)
        return size

    def _row_size(self, band: Band) -> StateSize:
        size = StateSize()
        for segment in band.segments:
            size = size.plus(self.block_state_size(segment.numel), segment.cols)
        return size

    @cached_property
    def runs(self) -> tuple[BlockRun, ...]:
        """All Top-K blocks, in state order."""
        return tuple(self._lay_runs())

    def _lay_runs(self) -> Iterator[BlockRun]:
        for span_index, (span, band_offset) in enumerate(zip(self.spans, self._span_offsets, strict=False)):
            if span.is_dense:
                continue
            for band in self.grid(span).bands(span.start, span.numel):
                row_size = self._row_size(band)
                offset = band_offset
                for segment in band.segments:
                    size = self.block_state_size(segment.numel)
                    extents = map(Extent, offset, row_size, size)
                    yield BlockRun(
                        span_index=span_index,
                        rows=band.rows,
                        cols=segment.cols,
                        numel=segment.numel,
                        num_kept=self.config.num_kept(segment.numel),
                        is_fragment=segment.is_fragment,
                        elements=Extent(span.offset + band.start + segment.start, band.row_numel, segment.numel),
                        **dict(zip(StateSize._fields, extents, strict=True)),
                    )
                    offset = offset.plus(size, segment.cols)
                band_offset = band_offset.plus(row_size, band.rows)

    @cached_property
    def sample(self) -> tuple[SampledRun, ...]:
        """A few blocks of every parameter, spread evenly over it: the same ones however the parameter is sharded."""
        return tuple(sampled for run in self.runs if (sampled := self._sample_run(run)).rows)

    def _sample_run(self, run: BlockRun) -> SampledRun:
        span = self.spans[run.span_index]
        grid = self.grid(span)
        num_blocks = span.global_shape[0] * grid.blocks_per_row
        # Odd numbers: an even distance would often meet the same columns in every row.
        num_sampled = min(num_blocks, max(MIN_SAMPLED_BLOCKS, num_blocks // SAMPLED_ONE_IN))
        first = grid.block_index(span.start + run.elements.start - span.offset)
        end = first + run.rows * grid.blocks_per_row
        # Sampled block i of the parameter is number i * num_blocks // num_sampled.
        sampled = range(-(-first * num_sampled // num_blocks), -(-end * num_sampled // num_blocks))
        places = [divmod(i * num_blocks // num_sampled - first, grid.blocks_per_row) for i in sampled]
        rows, cols = [row for row, col in places if col < run.cols], [col for _, col in places if col < run.cols]
        return SampledRun(run, rows, cols)

    @cached_property
    def dense_runs(self) -> tuple[DenseRun, ...]:
        """The intervals on the dense path, in state order."""
        runs = []
        state_start = 0
        for index, span in enumerate(self.spans):
            if span.is_dense:
                runs.append(DenseRun(index, span.offset, span.numel, state_start))
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

    @cached_property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """Name -> (dtype, number of elements) of every flat state tensor; a path without parameters has none."""
        tensors: dict[str, tuple[str, int]] = {}
        if any(not span.is_dense for span in self.spans):
            numels = self._sparse_numels(self._span_offsets[-1])
            dtypes = SPARSE_DTYPES | ({"values": "uint8"} if self.config.packed_window else {})
            tensors |= {name: (dtypes[name], numel) for name, numel in numels.items()}
        if any(span.is_dense for span in self.spans):
            tensors |= dict.fromkeys(DENSE_TENSORS, ("float32", self.dense_numel))
        return tensors

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> the shape in which a state tensor is kept and saved; to a backend all of them are flat.

        Whole rows of one parameter have one row of state each, so that the state can be sharded like the parameter;
        moments have the parameter's own shape. Everything else is flat.
        """
        if len(self.spans) != 1 or not self.spans[0].has_whole_rows:
            return {name: (numel,) for name, (_, numel) in self.tensors.items()}
        span = self.spans[0]
        rows = span.numel // max(span.row_numel, 1)
        if span.is_dense:
            return dict.fromkeys(self.tensors, (rows, *span.global_shape[1:]) if span.global_shape else ())
        row_size = self._row_size(self._whole_row(span))
        return {name: (rows, numel) for name, numel in self._sparse_numels(row_size).items()}

    def slot_columns(self, slot: int) -> dict[str, list[slice]]:
        """Where one slot of the window lies in every row of the window's tensors, block after block.

        For whole rows of one parameter on the Top-K path, in the shapes `shapes` says.
        """
        columns: dict[str, list[slice]] = {name: [] for name in WINDOW_TENSORS if name in self.tensors}
        for name, slices in columns.items():
            start = 0
            for segment in self._whole_row(self.spans[0]).segments:
                size = getattr(self.block_state_size(segment.numel), name)
                for _ in range(segment.cols):
                    slices.append(slice(start + slot * size, start + (slot + 1) * size))
                    start += self.config.window_size * size
        return columns

    def _whole_row(self, span: ShardSpan) -> Band:
        return Band(0, 1, span.row_numel, self.grid(span).segments(0, span.row_numel))

    def _sparse_numels(self, size: StateSize) -> dict[str, int]:
        """Elements of every tensor of the Top-K path that blocks of this size take."""
        numels = {}
        if self.config.ef_bits:
            ends = ("bucket_lo", "bucket_hi") if self.config.ef_bits > MAX_SCALED_BITS else ("bucket_scale",)
            numels = {"codes": size.codes} | dict.fromkeys(ends, size.buckets)
        if self.has_window:
            slots = self.config.window_size
            numels |= {"indices": slots * size.indices, "values": slots * size.values}
            if self.config.packed_window:
                numels["scales"] = slots * size.scales
        return numels

    @property
    def sparse_bytes(self) -> int:
        """Bytes of the error feedback and the window."""
        return self._num_bytes(name for name in self.tensors if name not in DENSE_TENSORS)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense path's moments."""
        return self._num_bytes(name for name in self.tensors if name in DENSE_TENSORS)

    def _num_bytes(self, names: Iterable[str]) -> int:
        return sum(self.tensors[name][1] * DTYPE_BYTES[self.tensors[name][0]] for name in names)
