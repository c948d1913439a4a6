"""Re-cutting state: exact for blocks that are whole on both sides or cut alike, lossless where it can be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from microadam_dist import CheckpointMismatchError, MicroAdamConfig
from microadam_dist.arithmetic.error_feedback import StoredError, decode_error
from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.arithmetic.window import Slot, decode_slot
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.reference import ReferenceBackend
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from microadam_dist.engines.cuts import zero12_shard
from microadam_dist.layout import ERROR_TENSORS, WINDOW_TENSORS, ShardSpan, StateLayout
from tests.amount import amount

from .blocks import assert_same, blocks, dense

SHAPES = {"a": (30, 300), "norm": (300,), "b": (17, 1001), "c": (64, 64)}
CONFIG = MicroAdamConfig(lr=1e-2, window_size=4, density=0.05, block_size=256)


def flat_layouts(world_size: int, config: MicroAdamConfig = CONFIG) -> list[StateLayout]:
    """ZeRO-1 and 2: all parameters one after the other, cut anywhere, padded at the end."""
    return [StateLayout(zero12_shard(SHAPES, world_size, rank).spans, config) for rank in range(world_size)]


def row_layouts(world_size: int, config: MicroAdamConfig = CONFIG) -> list[StateLayout]:
    """FSDP2: whole rows of every parameter, uneven, possibly none."""
    layouts = []
    for rank in range(world_size):
        spans, offset = [], 0
        for name, shape in SHAPES.items():
            rows = -(-shape[0] // world_size)
            first, last = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
            row = math.prod(shape) // shape[0]
            spans.append(ShardSpan(name, shape, first * row, (last - first) * row, offset))
            offset += (last - first) * row
        layouts.append(StateLayout(tuple(spans), config))
    return layouts


def train(layouts: list[StateLayout], num_steps: int = 7) -> list[SourceShard]:
    """Every shard is trained on its part of the same gradients."""
    shards = []
    for rank, layout in enumerate(layouts):
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(shape, generator=generator).flatten() for name, shape in SHAPES.items()}
        local, state = cut(layout, weights), allocate_state(layout, torch.device("cpu"))
        for step in range(num_steps):
            grads = {name: torch.randn(shape, generator=generator).flatten() for name, shape in SHAPES.items()}
            ReferenceBackend().step([TensorStep(local, cut(layout, grads), state, layout, step)], layout.config, 1.0)
        shards.append(SourceShard(layout, {"step": torch.tensor(num_steps), **state}, local, f"rank {rank}"))
    return shards


def cut(layout: StateLayout, full: dict[str, Tensor]) -> Tensor:
    local = torch.zeros(max((span.offset + span.numel for span in layout.spans), default=0))
    for span in layout.spans:
        local[span.offset : span.offset + span.numel] = full[span.fqn][span.start : span.start + span.numel]
    return local


def reshard(sources: list[SourceShard], layouts: list[StateLayout]) -> list[SourceShard]:
    resharder = Resharder(sources)
    targets = []
    for layout in layouts:
        weights = cut(layout, {name: torch.full((math.prod(shape),), math.nan) for name, shape in SHAPES.items()})
        resharder.weights(layout, weights)
        targets.append(SourceShard(layout, resharder.state(layout), weights, "resharded"))
    return targets


PACKED = replace(CONFIG, packed_window=True)
TERNARY = replace(CONFIG, ef_bits=1.6, block_size=1024)
NO_WINDOW, NO_ERROR_FEEDBACK = MicroAdamConfig(window_size=1, density=0.1), MicroAdamConfig(ef_bits=0)


@pytest.mark.parametrize("config", [CONFIG, PACKED, NO_WINDOW, NO_ERROR_FEEDBACK, TERNARY, replace(TERNARY, ef_bits=1)])
@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (2, 3), (3, 4), (4, 4)])
def test_rows_reshard_to_what_training_there_gives(before: int, after: int, config: MicroAdamConfig) -> None:
    got = reshard(train(row_layouts(before, config)), row_layouts(after, config))
    expected = train(row_layouts(after, config))
    for shard, straight in zip(got, expected, strict=True):
        assert torch.equal(shard.weights, straight.weights)
        assert_same(shard.state, straight.state)


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["wide", "packed"])
@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 3), (3, 1), (3, 3)])
def test_flat_shards_keep_every_block_that_is_cut_nowhere_or_in_the_same_place(
    before: int, after: int, config: MicroAdamConfig
) -> None:
    source = train(flat_layouts(before, config))
    target = reshard(source, flat_layouts(after, config))
    theirs, ours = blocks(source), blocks(target)
    common = theirs.keys() & ours.keys()
    assert len(ours) - len(common) <= 2 * (before + after - 2)
    for key in common:
        assert_same(ours[key], theirs[key])
    assert dense(source) == dense(target)
    assert torch.equal(full_weights(source), full_weights(target))


def full_weights(shards: list[SourceShard]) -> Tensor:
    return torch.cat([s.weights[p.offset : p.offset + p.numel] for s in shards for p in s.layout.spans])


def test_rows_to_flat_and_back() -> None:
    source = train(row_layouts(3))
    back = reshard(reshard(source, flat_layouts(2)), row_layouts(3))
    theirs, ours = blocks(source), blocks(back)
    assert theirs.keys() == ours.keys()
    differing = [key for key in theirs if not torch.equal(theirs[key]["codes"], ours[key]["codes"])]
    assert len(differing) <= 1  # the block that two flat shards share


@pytest.mark.parametrize("config", [CONFIG, PACKED], ids=["wide", "packed"])
def test_a_cut_block_keeps_its_error_and_its_largest_entries(config: MicroAdamConfig) -> None:
    shape = (20, 256)

    def layout(*interval: int) -> StateLayout:
        return StateLayout((ShardSpan("w", shape, *interval),), config)

    def decoded(shard: SourceShard) -> Tensor:
        """The error of the whole second row."""
        parts = []
        for block in (block for key, block in sorted(blocks([shard]).items()) if 256 <= key[1] < 512):
            numel = len(block["weights"])
            stored = StoredError.of({name: block[name][None] for name in ERROR_TENSORS if name in block})
            parts.append(decode_error(stored, numel, bits=config.ef_bits, bucket_size=config.bucket_size)[0])
        return torch.cat(parts)

    generator = torch.Generator().manual_seed(0)
    whole = layout(0, 5120)
    state = allocate_state(whole, torch.device("cpu"))
    weights = torch.zeros(5120)
    for step in range(6):
        grad = torch.randn(5120, generator=generator)
        ReferenceBackend().step([TensorStep(weights, grad, state, whole, step)], config, 1.0)
    source = SourceShard(whole, {"step": torch.tensor(6), **state}, weights, "whole")

    resharder = Resharder([source])
    for start in (256 + 100, 256 + 65):
        part = layout(start, 512 - start)
        target = SourceShard(part, resharder.state(part), weights[start:512], "part")
        bucket_widths = state["bucket_hi"][4:8].float() - state["bucket_lo"][4:8].float()
        error = (decoded(target) - decoded(source)[start - 256 :]).abs()
        assert error.max() <= 1.1 * bucket_widths.max() / 15  # two quantizations, one step at most
        (old,) = (block for key, block in blocks([source]).items() if key[1] == 256)
        (new,) = blocks([target]).values()
        for slot in range(4):
            expected = entries(old, slot, first=256, start=start)[: config.num_kept(512 - start)]
            got = entries(new, slot, first=start, start=start)
            half_a_code = max(abs(value) for _, value in expected) / 127 / 2 if config.packed_window else 0.0
            assert dict(got) == pytest.approx(dict(expected), rel=0, abs=1.01 * half_a_code)


def entries(block: dict[str, Tensor], slot: int, first: int, start: int) -> list[tuple[int, float]]:
    """(global index, value) of one slot from ``start`` on, largest magnitude first; empty places left out."""
    window = Slot(*(block[name].view(4, -1)[slot : slot + 1] if name in block else None for name in WINDOW_TENSORS))
    indices, values = (part[0].tolist() for part in decode_slot(window))
    assert indices == sorted(set(indices))
    found = [(first + i, value) for i, value in zip(indices, values, strict=True) if value and first + i >= start]
    return sorted(found, key=lambda entry: (-abs(entry[1]), entry[0]))


def test_steps_may_differ_and_slots_keep_their_age() -> None:
    """Two parameters with 3 and 6 steps come together in one flat tensor: the younger one's slots move by 3."""
    shapes = {"x": (16, 256), "y": (16, 256)}
    sources = []
    for (name, shape), num_steps in zip(shapes.items(), (3, 6), strict=True):
        layout = StateLayout((ShardSpan(name, shape, 0, 4096),), CONFIG)
        state, weights = allocate_state(layout, torch.device("cpu")), torch.zeros(4096)
        generator = torch.Generator().manual_seed(1)
        for step in range(num_steps):
            grad = torch.randn(4096, generator=generator)
            ReferenceBackend().step([TensorStep(weights, grad, state, layout, step)], CONFIG, 1.0)
        sources.append(SourceShard(layout, {"step": torch.tensor(num_steps), **state}, weights, name))
    spans = tuple(ShardSpan(name, shape, 0, 4096, 4096 * i) for i, (name, shape) in enumerate(shapes.items()))
    target = Resharder(sources).state(StateLayout(spans, CONFIG))
    assert int(target["step"]) == 6
    values = target["values"].view(2, 16, 4, -1)
    old, young = (source.state["values"].view(16, 4, -1) for source in reversed(sources))
    assert torch.equal(values[1], old)
    for age in range(4):
        assert torch.equal(values[0][:, (5 - age) % 4], young[:, (2 - age) % 4])


def test_unstepped_sources_give_no_state() -> None:
    sources = [SourceShard(layout, None, torch.zeros(20000), "fresh") for layout in flat_layouts(2)]
    assert Resharder(sources).state(flat_layouts(1)[0]) is None


@pytest.mark.parametrize("damage", ["missing", "shape", "settings", "name"])
def test_what_does_not_fit_is_named(damage: str) -> None:
    sources: list[Any] = train(flat_layouts(2), num_steps=1)
    if damage == "missing":
        sources.pop()
    if damage == "settings":
        other = MicroAdamConfig(window_size=5, density=0.05, block_size=256)
        sources = train(flat_layouts(2, other), num_steps=1)
    spans = {
        "shape": (ShardSpan("a", (60, 150), 0, 9000),),
        "name": (ShardSpan("z", (30, 300), 0, 9000),),
    }.get(damage, flat_layouts(1)[0].spans)
    expected = {"missing": "'b'", "shape": "(30, 300)", "settings": "window_size=5", "name": "'z'"}[damage]
    with pytest.raises(CheckpointMismatchError) as error:
        Resharder(sources).state(StateLayout(spans, CONFIG))
    assert expected in str(error.value)


def test_equal_copies_are_one() -> None:
    """Two whole ones, and whole and cut ones that overlap."""
    whole = train(flat_layouts(1))
    copy = replace(whole[0], weights=whole[0].weights.clone(), origin="copy")
    (once,), (twice,) = (reshard(sources, flat_layouts(1)) for sources in (whole, [*whole, copy]))
    assert torch.equal(once.weights, twice.weights)
    assert_same(once.state, twice.state)
    before_any_step = [
        SourceShard(layout, None, cut(layout, {name: torch.zeros(math.prod(s)) for name, s in SHAPES.items()}), "part")
        for layout in (*flat_layouts(1), *flat_layouts(2), *flat_layouts(3))
    ]
    Resharder(before_any_step)


@pytest.mark.parametrize(
    "difference", ["weights", "step", "codes", "values", "exp_avg", "shape", "window_size", "no state"]
)
@pytest.mark.parametrize("order", [1, -1])
def test_copies_that_differ_are_refused(difference: str, order: int) -> None:
    (source,) = train(flat_layouts(1))
    state = {name: tensor.clone() for name, tensor in source.state.items()}
    layout, weights = source.layout, source.weights.clone()
    if difference == "weights":
        weights[-1] = -weights[-1]
    elif difference == "step":
        state["step"] += 1
    elif difference == "shape":
        spans = tuple(replace(span, global_shape=(*span.global_shape, 1)) for span in layout.spans)
        layout = replace(layout, spans=spans)
    elif difference == "window_size":
        layout = replace(layout, config=replace(CONFIG, window_size=5))
    elif difference != "no state":
        state[difference].view(-1)[-1] += 1
    copy = SourceShard(layout, None if difference == "no state" else state, weights, "copy")
    with pytest.raises(CheckpointMismatchError, match="rank 0 and in copy|copy and in rank 0") as error:
        Resharder([source, copy][::order])
    assert f"({'step' if difference == 'no state' else difference})" in str(error.value)
    assert any(f"parameter {name!r}" in str(error.value) for name in SHAPES)


def test_a_part_that_differs_from_the_whole_is_refused() -> None:
    """Between them lies a part that has nothing to say about it."""
    shape = (16, 256)

    def part(start: int, numel: int, change: int | None = None) -> SourceShard:
        weights = torch.arange(start, start + numel, dtype=torch.float32)
        if change is not None:
            weights[change - start] += 1
        return SourceShard(StateLayout((ShardSpan("w", shape, start, numel),), CONFIG), None, weights, f"from {start}")

    Resharder([part(0, 4096), part(100, 50), part(200, 300)])
    with pytest.raises(CheckpointMismatchError, match=r"elements 200 to 500 of parameter 'w'.*from 0 and in from 200"):
        Resharder([part(0, 4096), part(100, 50), part(200, 300, change=499)])
    Resharder([part(0, 300), part(200, 300), part(500, 100)])


@settings(max_examples=amount(250), deadline=None)
@given(st.lists(st.integers(1, 8), min_size=2, max_size=4))
def test_any_chain_of_row_shardings_is_the_identity(chain: list[int]) -> None:
    source = shards = train(row_layouts(chain[0]), num_steps=2)
    for world_size in [*chain[1:], chain[0]]:
        shards = reshard(shards, row_layouts(world_size))
    for got, expected in zip(shards, source, strict=True):
        assert torch.equal(got.weights, expected.weights)
        assert_same(got.state, expected.state)
