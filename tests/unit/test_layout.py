"""Spans, grids and state sizes: figures computed by hand, and properties that hold for every cut of every shape."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microadam_dist import MicroAdam
from microadam_dist.arithmetic.blocks import block_views
from microadam_dist.arithmetic.state import allocate_state, state_specs
from microadam_dist.config import SUPPORTED_EF_BITS, MicroAdamConfig
from microadam_dist.errors import UnsupportedLayoutError
from microadam_dist.layout import DTYPE_BYTES, BlockGrid, BlockRun, Extent, ShardSpan, StateLayout, StateSize


def whole(*shape: int, offset: int = 0) -> ShardSpan:
    return ShardSpan("w", shape, start=0, numel=torch.Size(shape).numel(), offset=offset)


def layout_of(*spans: ShardSpan, **overrides) -> StateLayout:
    return StateLayout(spans, MicroAdamConfig(**{**MicroAdam.paper_defaults(), **overrides}))


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("row_numel", "block_size", "blocks"),
    [
        (11008, 4096, [2752] * 4),
        (4096, 4096, [4096]),
        (13824, 4096, [3456] * 4),
        (18944, 4096, [2368] * 8),
        (10007, 4096, [3336, 3336, 3335]),
        (4104, 4096, [1368] * 3),  # 2 blocks of 2052 would be no multiple of 8
        (4097, 4096, [2056, 2041]),
        (4095, 4096, [4095]),  # one block per row may have any length
        (65, 64, [40, 25]),
        (577, 64, [64] * 9 + [1]),  # the shortest last block there is
        (136, 64, [48, 48, 40]),  # 17 blocks of 8 would be more than 4 * 3
        (200, 128, [40] * 5),
        (64, 32768, [64]),
    ],
)
def test_blocks_of_one_row(row_numel: int, block_size: int, blocks: list[int]) -> None:
    grid = BlockGrid.from_shape((3, row_numel), block_size)
    got = [segment.numel for segment in grid.segments(0, row_numel) for _ in range(segment.cols)]
    assert got == blocks
    assert grid.blocks_per_row == len(blocks)


def test_grid_of_a_convolution_is_that_of_its_flattened_rows() -> None:
    assert BlockGrid.from_shape((64, 512, 3, 3), 4096) == BlockGrid.from_shape((64, 4608), 4096)


@pytest.mark.parametrize(
    ("shape", "is_dense"),
    [
        ((64, 64), False),  # exactly 4096 elements in rows of exactly 64
        ((1, 4096), False),
        ((64, 1, 8, 8), False),
        ((1, 4095), True),  # one element short
        ((65, 63), True),
        ((4096, 63), True),  # rows one element short
        ((4096, 7, 3, 3), True),
        ((4096, 1), True),
        ((4096,), True),  # fewer than 2 dimensions
        ((1 << 20,), True),
        ((), True),
        ((0, 4096), True),
        ((4096, 0), True),
    ],
)
def test_dense_path(shape: tuple[int, ...], is_dense: bool) -> None:
    span = whole(*shape)
    layout = layout_of(span)
    assert span.is_dense is is_dense
    assert (layout.dense_numel, layout.sparse_numel) == ((span.numel, 0) if is_dense else (0, span.numel))
    assert set(layout.tensors) == (
        {"exp_avg", "exp_avg_sq"} if is_dense else {"codes", "bucket_lo", "bucket_hi", "indices", "values"}
    )


def test_path_is_decided_by_the_global_shape() -> None:
    assert not ShardSpan("w", (64, 64), start=4095, numel=1).is_dense


@pytest.mark.parametrize(("start", "numel", "offset"), [(-1, 1, 0), (0, -1, 0), (0, 1, -1), (0, 4097, 0), (4096, 1, 0)])
def test_span_outside_its_parameter(start: int, numel: int, offset: int) -> None:
    with pytest.raises(UnsupportedLayoutError, match="does not lie inside"):
        ShardSpan("w", (64, 64), start, numel, offset)


# ---------------------------------------------------------------- sizes


def _code_bytes(numel: int, ef_bits: float) -> int:
    """Of three levels: five codes in a byte, for each 512 elements a multiple of eight bytes."""
    if ef_bits != 1.6:
        return math.ceil(numel * ef_bits / 8)
    return numel // 512 * 104 + math.ceil(numel % 512 / 40) * 8


@pytest.mark.parametrize(
    ("settings_", "bytes_per_param"),
    [
        ({}, 0.5 + 2 * 2 / 64 + 10 * (2 + 2) * 41 / 4096),  # ceil(40.96) kept of 4096
        ({"bucket_size": 256}, 0.5 + 2 * 2 / 256 + 10 * (2 + 2) * 41 / 4096),
        ({"density": 0.05, "window_size": 2}, 0.5625 + 2 * 4 * 205 / 4096),
        ({"window_size": 1}, 0.5625),
        ({"density": 0.05, "window_size": 2, "packed_window": True}, 0.5625 + 2 * (308 + 205 + 2) / 4096),
        ({"packed_window": True}, 0.5625 + 10 * (62 + 41 + 2) / 4096),
        ({"ef_bits": 8}, 1 + 0.0625 + 40 * 41 / 4096),
        ({"ef_bits": 2, "window_size": 1}, 0.25 + 0.03125),
        ({"ef_bits": 1.6, "window_size": 1}, 832 / 4096 + 0.03125),
        ({"ef_bits": 1, "window_size": 1}, 0.125 + 0.03125),
        ({"ef_bits": 0}, 40 * 41 / 4096),
        ({"ef_bits": 0, "window_size": 1}, 0.0),
    ],
)
def test_bytes_per_parameter(settings_: dict, bytes_per_param: float) -> None:
    layout = layout_of(whole(4096, 4096), **settings_)
    assert layout.sparse_bytes / layout.sparse_numel == bytes_per_param
    assert layout.dense_bytes == 0


def test_documented_bytes_per_parameter() -> None:
    assert StateLayout((whole(4096, 4096),), MicroAdamConfig()).sparse_bytes / 4096**2 == 0.5625
    assert layout_of(whole(4096, 4096)).sparse_bytes / 4096**2 == 0.962890625
    assert layout_of(whole(4096, 4096), bucket_size=256).sparse_bytes / 4096**2 == 0.916015625
    dense = layout_of(whole(4096))
    assert dense.dense_bytes / dense.dense_numel == 8


def test_layout_of_a_flat_shard_by_hand() -> None:
    """ZeRO: the end of one parameter, a bias and the beginning of another, with padding between them."""
    layout = layout_of(
        ShardSpan("a", (70, 65), start=70 * 65 - 100, numel=100, offset=8),  # 5 + 25 of row 68, row 69
        ShardSpan("bias", (10,), start=0, numel=10, offset=200),
        ShardSpan("b", (80, 128), start=0, numel=3 * 128 + 1, offset=300),
        block_size=64,
        bucket_size=16,
        density=0.1,
        window_size=3,
    )
    got = [(run.rows, run.cols, run.numel, run.num_kept, run.is_fragment, run.elements.start) for run in layout.runs]
    assert got == [
        (1, 1, 10, 1, True, 8),  # row 68 is cut 40 | 25; the span begins 10 elements before that edge
        (1, 1, 25, 3, False, 18),
        (1, 1, 40, 4, False, 43),
        (1, 1, 25, 3, False, 83),
        (3, 2, 64, 7, False, 300),
        (1, 1, 1, 1, True, 684),
    ]
    assert [(run.start, run.numel, run.state_start) for run in layout.dense_runs] == [(200, 10, 0)]
    code_bytes = 5 + 13 + 20 + 13 + 6 * 32 + 1
    num_buckets = 1 + 2 + 3 + 2 + 6 * 4 + 1
    stored = 3 * (1 + 3 + 4 + 3 + 6 * 7 + 1)
    assert layout.tensors == {
        "codes": ("uint8", code_bytes),
        "bucket_lo": ("bfloat16", num_buckets),
        "bucket_hi": ("bfloat16", num_buckets),
        "indices": ("uint8", 2 * stored),
        "values": ("bfloat16", stored),
        "exp_avg": ("float32", 10),
        "exp_avg_sq": ("float32", 10),
    }
    assert num_fragments(layout) == 2
    assert layout.sparse_bytes == code_bytes + 2 * 2 * num_buckets + 4 * stored
    assert layout.dense_bytes == 80


# ---------------------------------------------------------------- properties


def num_fragments(layout: StateLayout) -> int:
    """Blocks cut by a shard edge."""
    return sum(run.num_blocks for run in layout.runs if run.is_fragment)


class Block(NamedTuple):
    """One block of a `BlockRun`: where it begins and what it takes, in the local tensor and in the state."""

    start: int
    numel: int
    num_kept: int
    is_fragment: bool
    codes: tuple[int, int]
    buckets: tuple[int, int]
    indices: tuple[int, int]
    values: tuple[int, int]
    scales: tuple[int, int]


def blocks_of(run: BlockRun) -> Iterator[Block]:
    def at(extent: Extent, row: int, col: int) -> tuple[int, int]:
        return extent.start + row * extent.row_stride + col * extent.size, extent.size

    for row in range(run.rows):
        for col in range(run.cols):
            start, numel = at(run.elements, row, col)
            state = [at(extent, row, col) for extent in run.extents[1:]]
            assert numel == run.numel
            yield Block(start, numel, run.num_kept, run.is_fragment, *state)


def blocks_by_position(layout: StateLayout) -> list[Block]:
    return sorted(block for run in layout.runs for block in blocks_of(run))


def edges_of_a_row(row_numel: int, block_size: int) -> list[int]:
    """The text of architecture.md, word for word and without the package."""
    n0 = -(-row_numel // block_size)
    equal = [n for n in range(n0, 4 * n0 + 1) if row_numel % n == 0 and row_numel // n % 8 == 0]
    size = row_numel // equal[0] if equal else min(row_numel, (-(-row_numel // n0) + 7) // 8 * 8)
    return [*range(0, row_numel, size), row_numel]


dims = st.integers(1, 40)
rows_and_columns = st.tuples(st.integers(1, 70), st.integers(64, 1500))
long_rows = st.tuples(st.integers(1, 3), st.integers(2000, 70000))
convolutions = st.tuples(dims, dims, st.integers(1, 5), st.integers(1, 5))
sparse_shapes = (rows_and_columns | long_rows | convolutions).filter(lambda shape: not whole(*shape).is_dense)
all_shapes = sparse_shapes | st.lists(st.integers(0, 80), max_size=3).map(tuple)
any_settings = st.fixed_dictionaries(
    {
        "window_size": st.integers(1, 12),
        "density": st.sampled_from([1e-4, 0.01, 0.05, 0.3, 1.0]),
        "block_size": st.integers(8, 4096).map(lambda eighth: 8 * eighth),
        "bucket_size": st.sampled_from([2, 6, 64, 100, 256, 70000]),
        "ef_bits": st.sampled_from(SUPPORTED_EF_BITS),
    }
)
packed_settings = st.fixed_dictionaries(
    {
        "window_size": st.integers(2, 12),
        "density": st.sampled_from([1e-4, 0.01, 0.05, 0.3, 1.0]),
        "block_size": st.integers(8, 512).map(lambda eighth: 8 * eighth),
        "packed_window": st.just(True),
    }
)
configs = (any_settings | packed_settings).map(lambda settings: MicroAdamConfig(**settings))


@st.composite
def cuts(draw: st.DrawFn, unit: int, total: int) -> list[tuple[int, int]]:
    """Intervals [begin, end) between random points in 0..total, in multiples of ``unit``; some may be empty."""
    points = draw(st.lists(st.integers(0, total), max_size=4))
    return [(unit * a, unit * b) for a, b in pairwise(sorted([0, *points, total]))]


@st.composite
def local_tensors(draw: st.DrawFn) -> tuple[ShardSpan, ...]:
    """Spans of several parameters in one flat tensor, with gaps between them."""
    spans, offset = [], 0
    for index, shape in enumerate(draw(st.lists(all_shapes, min_size=1, max_size=4))):
        total = torch.Size(shape).numel()
        begin, end = draw(st.sampled_from(draw(cuts(1, total))))
        offset += draw(st.integers(0, 50))
        spans.append(ShardSpan(str(index), shape, begin, end - begin, offset))
        offset += end - begin
    return tuple(spans)


@settings(deadline=None)
@given(data=st.data(), shape=sparse_shapes, config=configs)
def test_any_cut_tiles_the_parameter_along_its_grid(
    data: st.DataObject, shape: tuple[int, ...], config: MicroAdamConfig
) -> None:
    numel = torch.Size(shape).numel()
    row_numel = numel // shape[0]
    shards = [ShardSpan("w", shape, a, b - a) for a, b in data.draw(cuts(1, numel))]
    got, fragments = [], 0
    for span in shards:
        layout = StateLayout((span,), config)
        got += [(span.start + block.start, block.numel, block.is_fragment) for block in blocks_by_position(layout)]
        fragments += num_fragments(layout)

    grid = {row * row_numel + edge for row in range(shape[0]) for edge in edges_of_a_row(row_numel, config.block_size)}
    inside_a_block = {span.start for span in shards if span.numel} - grid
    edges = sorted(grid | inside_a_block)
    expected = [(a, b - a, a in inside_a_block or b in inside_a_block) for a, b in pairwise(edges)]
    assert got == expected
    assert fragments == sum(is_fragment for _, _, is_fragment in expected) <= 2 * len(inside_a_block)


@settings(deadline=None)
@given(data=st.data(), shape=sparse_shapes, config=configs)
def test_row_shards_have_the_blocks_and_the_state_of_the_whole(
    data: st.DataObject, shape: tuple[int, ...], config: MicroAdamConfig
) -> None:
    """What lets FSDP2 cut every state tensor by rows, and reshard it."""
    row_numel = torch.Size(shape).numel() // shape[0]
    got, before, sizes = [], [0] * len(StateSize._fields), []
    for begin, end in data.draw(cuts(row_numel, shape[0])):
        layout = StateLayout((ShardSpan("w", shape, begin, end - begin),), config)
        blocks = blocks_by_position(layout)
        for block in blocks:
            state = [(start + base, size) for base, (start, size) in zip(before, block[4:], strict=True)]
            got.append((begin + block.start, *block[1:4], *state))
        before = [base + sum(block[i][1] for block in blocks) for i, base in enumerate(before, start=4)]
        sizes.append(layout.tensors)

    unsharded = StateLayout((whole(*shape),), config)
    assert got == blocks_by_position(unsharded)
    assert num_fragments(unsharded) == 0
    for name, (dtype, numel) in unsharded.tensors.items():
        assert sum(tensors[name][1] for tensors in sizes) == numel
        assert {tensors[name][0] for tensors in sizes} == {dtype}
        assert numel % shape[0] == 0


@settings(deadline=None)
@given(data=st.data(), shape=sparse_shapes, config=configs)
def test_every_row_owns_one_interval_of_state_of_the_same_length(
    data: st.DataObject, shape: tuple[int, ...], config: MicroAdamConfig
) -> None:
    row_numel = torch.Size(shape).numel() // shape[0]
    begin, end = data.draw(st.sampled_from(data.draw(cuts(row_numel, shape[0]))))
    blocks = blocks_by_position(StateLayout((ShardSpan("w", shape, begin, end - begin),), config))
    for field in StateSize._fields:
        owned = [
            sorted(getattr(block, field) for block in blocks if block.start // row_numel == row)
            for row in range((end - begin) // row_numel)
        ]
        lengths = {sum(size for _, size in intervals) for intervals in owned}
        assert len(lengths) <= 1
        position = 0
        for start, size in (interval for intervals in owned for interval in intervals):
            assert start == position
            position += size


@settings(deadline=None)
@given(spans=local_tensors(), config=configs)
def test_state_follows_the_blocks_without_gap_or_overlap(spans: tuple[ShardSpan, ...], config: MicroAdamConfig) -> None:
    layout = StateLayout(spans, config)
    blocks = blocks_by_position(layout)
    for field in StateSize._fields:
        position = 0
        for block in blocks:  # spans and blocks in the order of the local tensor
            start, size = getattr(block, field)
            assert start == position
            position += size
    for block in blocks:
        assert block.codes[1] == _code_bytes(block.numel, config.ef_bits)
        assert block.buckets[1] == (-(-block.numel // config.bucket_size) if config.ef_bits else 0)
        assert block.num_kept == config.num_kept(block.numel)
        k, has_window = block.num_kept, config.window_size > 1
        assert block.values[1] == k * has_window
        assert block.indices[1] == (math.ceil(1.5 * k) if config.packed_window else 2 * k) * has_window
        assert block.scales[1] == config.packed_window
        assert 1 <= block.num_kept <= block.numel <= config.block_size
    assert sum(block.numel for block in blocks) == layout.sparse_numel
    assert layout.sparse_numel + layout.dense_numel == sum(span.numel for span in spans)


@settings(deadline=None)
@given(data=st.data(), spans=local_tensors(), config=configs)
def test_views_touch_every_state_element_once_and_no_padding(
    data: st.DataObject, spans: tuple[ShardSpan, ...], config: MicroAdamConfig
) -> None:
    layout = StateLayout(spans, config)
    state = allocate_state(layout, torch.device("cpu"))
    local_numel = spans[-1].offset + spans[-1].numel + 3
    param, grad = torch.zeros(local_numel), torch.zeros(local_numel)
    touched = torch.zeros(local_numel)
    for run in layout.runs:
        middle = data.draw(st.integers(0, run.rows))  # a run may be worked off in pieces
        for rows in (range(middle), range(middle, run.rows)):
            weights, gradient, error, window, _ = block_views(layout, run, param, grad, state, rows)
            for view in (weights, gradient, *(error or ()), *(window or ())):
                if view is not None:
                    view += 1
    for dense in layout.dense_runs:
        param[dense.start : dense.start + dense.numel] += 1
        grad[dense.start : dense.start + dense.numel] += 1
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][dense.state_start : dense.state_start + dense.numel] += 1
    for span in spans:
        touched[span.offset : span.offset + span.numel] = 1

    assert torch.equal(param, touched)
    assert torch.equal(grad, touched)
    for name, tensor in state.items():
        assert bool((tensor == 1).all()), name


@settings(deadline=None)
@given(data=st.data(), spans=local_tensors(), config=configs)
def test_state_slices_are_those_of_the_blocks_between_the_ends(
    data: st.DataObject, spans: tuple[ShardSpan, ...], config: MicroAdamConfig
) -> None:
    """Resharding cuts the state with these."""
    layout = StateLayout(spans, config)
    for index, span in enumerate(spans):
        blocks = [b for b in blocks_by_position(layout) if 0 <= b.start - span.offset < span.numel]
        if not blocks:
            continue
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(blocks) - 1)] * 2)))
        start, end = blocks[first].start, blocks[last].start + blocks[last].numel
        at = {name: (getattr(blocks[first], name)[0], sum(getattr(blocks[last], name))) for name in Block._fields[4:]}
        window = {
            name: slice(*(layout.config.window_size * edge for edge in at[name]))
            for name in ("indices", "values", "scales")
        }
        expected = {
            "codes": slice(*at["codes"]),
            "bucket_lo": slice(*at["buckets"]),
            "bucket_hi": slice(*at["buckets"]),
            "bucket_scale": slice(*at["buckets"]),
            **window,
        }
        to_global = span.start - span.offset
        got = layout.state_slices(index, start + to_global, end + to_global)
        assert got == {name: part for name, part in expected.items() if name in layout.tensors}


@settings(deadline=None)
@given(spans=local_tensors(), config=configs)
def test_planned_bytes_are_allocated_bytes(spans: tuple[ShardSpan, ...], config: MicroAdamConfig) -> None:
    layout = StateLayout(spans, config)
    state = allocate_state(layout, torch.device("cpu"))
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in state.items()} == state_specs(layout)
    assert all(tensor.element_size() == DTYPE_BYTES[layout.tensors[name][0]] for name, tensor in state.items())
    dense = sum(tensor.nbytes for name, tensor in state.items() if name in ("exp_avg", "exp_avg_sq"))
    assert (layout.sparse_bytes, layout.dense_bytes) == (sum(t.nbytes for t in state.values()) - dense, dense)
    assert not any(tensor.any() for tensor in state.values())


@settings(deadline=None)
@given(data=st.data(), shape=sparse_shapes, block_size=configs.map(lambda config: config.block_size))
def test_a_span_has_at_most_three_bands(data: st.DataObject, shape: tuple[int, ...], block_size: int) -> None:
    begin, end = data.draw(st.sampled_from(data.draw(cuts(1, torch.Size(shape).numel()))))
    assert len(BlockGrid.from_shape(shape, block_size).bands(begin, end - begin)) <= 3


def numels(layout: StateLayout) -> dict[str, int]:
    return {name: torch.Size(shape).numel() for name, shape in layout.shapes.items()}


@pytest.mark.parametrize("window_size", [1, 4])
@pytest.mark.parametrize("ef_bits", SUPPORTED_EF_BITS)
@pytest.mark.parametrize("shape", [(40, 301), (3, 5000), (16, 32, 3, 3), (61,), (50, 5)])
def test_whole_rows_have_a_row_of_state_each(shape: tuple[int, ...], ef_bits: float, window_size: int) -> None:
    overrides = {"ef_bits": ef_bits, "window_size": window_size, "block_size": 256, "density": 0.05}
    overrides["packed_window"] = ef_bits == 4 and window_size > 1
    row_numel = torch.Size(shape[1:]).numel()
    unsharded = layout_of(whole(*shape), **overrides)
    assert all(rows == shape[0] for rows, *_ in unsharded.shapes.values())
    for first, end in ((0, shape[0]), (0, 1), (1, 3), (3, 3), (2, shape[0])):
        layout = layout_of(ShardSpan("w", shape, first * row_numel, (end - first) * row_numel), **overrides)
        assert layout.shapes == {name: (end - first, *row) for name, (_, *row) in unsharded.shapes.items()}
        assert numels(layout) == {name: numel for name, (_, numel) in layout.tensors.items()}
    if len(shape) == 1 or row_numel < 64:
        assert unsharded.shapes == {"exp_avg": shape, "exp_avg_sq": shape}


@pytest.mark.parametrize(
    "spans",
    [
        (ShardSpan("w", (40, 301), 7, 602),),
        (ShardSpan("w", (40, 301), 301, 302),),
        (whole(40, 301), whole(40, 301, offset=40 * 301)),
        (whole(40, 301), whole(61, offset=40 * 301)),
        (),
    ],
)
def test_all_other_state_is_flat(spans: tuple[ShardSpan, ...]) -> None:
    layout = layout_of(*spans)
    assert layout.shapes == {name: (numel,) for name, (_, numel) in layout.tensors.items()}


@pytest.mark.parametrize("shape", [(), (0,), (0, 128), (128, 0)])
def test_scalars_and_empty_parameters_have_state_of_their_size(shape: tuple[int, ...]) -> None:
    layout = layout_of(whole(*shape))
    assert numels(layout) == {name: numel for name, (_, numel) in layout.tensors.items()}
