"""What is measured, against numbers computed one by one; when it is; and that the training does not notice."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microadam_dist import ConfigError, release_gradients
from microadam_dist.config import MicroAdamConfig
from microadam_dist.engines.cuts import row_shard, zero3_shard, zero12_shard
from microadam_dist.layout import MIN_SAMPLED_BLOCKS, StateLayout
from tests.kernels.oracle import Block, ScalarMicroAdam
from tests.unit.training import gradient, make_params, microadam, params_of, snapshot, train

SHAPES = [(40, 136), (32, 16, 3, 3), (9, 1000), (136,), (4, 8)]  # three on the Top-K path, two on the dense path


# ---------------------------------------------------------------- the numbers


def decoded(oracle: ScalarMicroAdam, block: Block) -> list[float]:
    if not oracle.s.ef_bits:
        return [0.0] * len(block.places)
    return [float(bucket.lo) + code * float(bucket.step) for bucket in block.buckets for code in bucket.codes]


def expected_metrics(oracle: ScalarMicroAdam, param: Tensor, grad: Tensor, step: int) -> dict[str, float]:
    """Takes the step of the oracle, and computes the metrics in float64 from what it holds before and after."""
    numbers = grad.flatten().float().numpy()
    errors = [decoded(oracle, block) for block in oracle.blocks]
    before = param.detach().flatten().float().numpy()
    new = before.copy()
    skipped = oracle.step(new, numbers, step, 1.0)
    sums = dict.fromkeys(["g", "kept", "a", "r", "qr", "e", "touched", "weights", "changed"], 0.0)
    window = oracle.s.window_size
    for block, error in zip(oracle.blocks, errors, strict=True):
        g = [float(numbers[place]) for place in block.places]
        if not all(math.isfinite(x) for x in g):
            continue
        a = [x + y for x, y in zip(g, error, strict=True)]
        kept = dict(block.slots[step % window])
        left = [x if i not in kept else x - float(kept[i]) if oracle.s.packed_window else 0.0 for i, x in enumerate(a)]
        after = decoded(oracle, block)
        sums["g"] += sum(x * x for x in g)
        sums["kept"] += sum(g[i] ** 2 for i in kept)
        sums["a"] += sum(x * x for x in a)
        sums["r"] += sum(x * x for x in left)
        sums["qr"] += sum((x - y) ** 2 for x, y in zip(left, after, strict=True))
        sums["e"] += sum(x * x for x in after)
        slots = [block.slots[slot] for slot in range(window) if slot <= step]
        sums["touched"] += len({i for slot in slots for i, value in slot if value})
        sums["weights"] += len(a)
        sums["changed"] += sum(before[place] != new[place] for place in block.places)
    q, omega = math.sqrt(sums["r"] / sums["a"]), math.sqrt(sums["qr"] / sums["r"])
    return {
        "q": q,
        "omega": omega,
        "q_omega": (1 + omega) * q,
        "error_to_gradient": math.sqrt(sums["e"] / sums["g"]),
        "gradient_kept": sums["kept"] / sums["g"],
        "touched": sums["touched"] / sums["weights"],
        "changed": sums["changed"] / sums["weights"],
        "nonfinite_blocks": float(skipped),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window_size": 1, "density": 0.1},
        {"ef_bits": 0},
        {"ef_bits": 1.6, "window_size": 3},
        {"ef_bits": 1},
        {"packed_window": True},
        {"lr": 1e-5, "dtype": torch.bfloat16, "seed": 3},
        {"lr": 1e-3, "dtype": torch.bfloat16, "rounding": "nearest", "weight_decay": 1.0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:rounding to nearest")
def test_against_scalar_arithmetic(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 30 blocks are sampled; one block is not finite in the fourth step."""
    monkeypatch.setattr("microadam_dist.layout.state.MIN_SAMPLED_BLOCKS", 30)
    dtype = settings.get("dtype", torch.float32)
    param = make_params([(10, 600)], dtype)[0]
    settings = {name: value for name, value in settings.items() if name != "dtype"}
    config = MicroAdamConfig(**{"block_size": 200, "window_size": 4, **settings})
    oracle = ScalarMicroAdam([((10, 600), 0, 6000, 0)], config, str(dtype).removeprefix("torch."))
    optimizer = microadam([param], metrics_every=1, **vars(config))
    for step in range(8):
        param.grad = gradient(param, seed=step)
        param.grad[0] = 0.0  # zeros are kept, too, but move nothing
        if step == 3:
            param.grad[4, 450] = math.nan
        expected = expected_metrics(oracle, param, param.grad, step)
        with pytest.warns(UserWarning, match="skipped 1 blocks") if step == 3 else contextlib.nullcontext():
            optimizer.step()
        if step >= 3:
            expected["nonfinite_blocks"] = 1.0  # so far
        assert optimizer.metrics == pytest.approx(expected, rel=1e-5), step


@pytest.mark.parametrize(
    ("dtype", "settings", "warns"),
    [
        (torch.bfloat16, {"rounding": "nearest", "lr": 1e-5}, True),
        (torch.float16, {"lr": 1e-6}, True),
        (torch.bfloat16, {"rounding": "nearest", "lr": 1e-1}, False),
        (torch.bfloat16, {"rounding": "nearest", "lr": 0.0}, False),
        (torch.bfloat16, {"lr": 1e-5}, False),
        (torch.float32, {"lr": 1e-12}, False),
    ],
    ids=str,
)
def test_lost_updates_are_warned_of_once(dtype: torch.dtype, settings: dict[str, Any], warns: bool) -> None:
    optimizer = microadam(make_params(SHAPES, dtype), metrics_every=2, **{"window_size": 1, **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(optimizer, range(5))
    found = [str(w.message) for w in caught if "rounding to nearest leaves" in str(w.message)]
    assert len(found) == warns
    assert (optimizer.metrics["changed"] < optimizer.metrics["touched"] / 2) == (warns or settings["lr"] < 1e-4)


# ---------------------------------------------------------------- the sample


def sampled_elements(layout: StateLayout) -> set[tuple[str, int]]:
    """First element in the parameter, and name, of everything in the sample; of fragments that of their block."""
    found = set()
    for run, rows, cols in layout.sample:
        span = layout.spans[run.span_index]
        for row, col in zip(rows, cols, strict=True):
            local = run.elements.start + row * run.elements.row_stride + col * run.elements.size
            position = local - span.offset + span.start
            assert span.start <= position < span.start + span.numel
            found.add((span.fqn, layout.grid(span).block_interval(position)[0]))
    return found


GLOBAL = {"embed": (3001, 96), "wide": (40, 20480), "odd": (70, 9001), "few": (3, 1500), "norm": (96,)}


def test_sample_is_spread_over_rows_and_columns() -> None:
    layout = StateLayout(row_shard("wide", (4096, 20480), 1, 0).spans, MicroAdamConfig())
    sample = sampled_elements(layout)
    assert len(sample) == 4096 * 5 // 97
    assert {position % 20480 // 4096 for _, position in sample} == set(range(5))
    assert max(np.diff(sorted(position for _, position in sample))) < 100 * 4096
    small = StateLayout(row_shard("few", (3, 1500), 1, 0).spans, MicroAdamConfig())
    assert len(sampled_elements(small)) == 3


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_sample_does_not_depend_on_the_sharding(world_size: int) -> None:
    config, ranks = MicroAdamConfig(block_size=512), range(world_size)
    whole = [StateLayout(row_shard(fqn, shape, 1, 0).spans, config) for fqn, shape in GLOBAL.items()]
    expected = set().union(*map(sampled_elements, whole))
    assert min(sum(fqn == name for name, _ in expected) for fqn in ("embed", "wide", "odd")) >= MIN_SAMPLED_BLOCKS
    rows = [row_shard(fqn, shape, world_size, rank) for fqn, shape in GLOBAL.items() for rank in ranks]
    zero3 = [zero3_shard(GLOBAL, world_size, rank) for rank in ranks]
    zero12 = [zero12_shard(GLOBAL, world_size, rank) for rank in ranks]
    for shards in (rows, zero3, zero12):
        assert set().union(*(sampled_elements(StateLayout(shard.spans, config)) for shard in shards)) == expected


# ---------------------------------------------------------------- when, and at what price


def test_off_is_nothing() -> None:
    optimizer = microadam(make_params(SHAPES))
    train(optimizer, range(3))
    assert optimizer.metrics == {} and optimizer.metrics_every == 0
    assert optimizer._meter is None
    assert not any("sample" in vars(layout) for layout in optimizer.sharded.layouts().values())


@pytest.mark.parametrize("every", [-1, 2.5, "50", True])
def test_errors(every: Any) -> None:
    with pytest.raises(ConfigError, match=r"metrics_every=.* expected 0 \(off\) or a number of steps"):
        microadam(make_params(SHAPES), metrics_every=every)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_the_training_changes(dtype: torch.dtype) -> None:
    for settings in ({}, {"window_size": 1}, {"density": 0.05, "weight_decay": 0.1}):
        snapshots = []
        for every in (0, 1, 3):
            optimizer = microadam(make_params(SHAPES, dtype), metrics_every=every, **settings)
            torch.manual_seed(1)
            train(optimizer, range(7), skip=lambda seed, index: (seed + index) % 3 == 0)
            snapshots.append([snapshot(optimizer), torch.rand(2).tolist()])  # nor that of random numbers
        assert snapshots[0] == snapshots[1] == snapshots[2]


def test_every_third_real_step() -> None:
    """A probe for the state is none."""
    optimizer = microadam(make_params(SHAPES), metrics_every=3)
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    seen = []
    for seed in range(8):
        train(optimizer, [seed])
        seen.append(optimizer.metrics)
    assert [bool(metrics) for metrics in seen] == [False, False, True, True, True, True, True, True]
    assert seen[2] is seen[3] is seen[4] is not seen[5]
    assert seen[2] != seen[5]
    assert all(type(value) is float for value in seen[5].values())


def test_copies_go_on_measuring() -> None:
    optimizer = microadam(make_params(SHAPES), metrics_every=2)
    train(optimizer, range(3))
    twin = copy.deepcopy(optimizer)
    train(optimizer, [3])
    train(twin, [3])
    assert twin.metrics == optimizer.metrics != {}
    assert twin.metrics is not optimizer.metrics


def test_released_gradients_give_the_same_metrics() -> None:
    found = []
    for release in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.Tanh(), torch.nn.Linear(80, 96))
        optimizer = microadam(model.parameters(), metrics_every=2)
        if release:
            release_gradients(model, optimizer)
        metrics = []
        for step in range(5):
            inputs = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(optimizer.metrics)
        found.append(metrics)
    assert found[1] == [pytest.approx(metrics, rel=1e-12) for metrics in found[0]]
    assert not found[0][0] and found[0][1] is found[0][2] is not found[0][3]


def test_several_calls_for_one_step() -> None:
    """As ZeRO-3 steps its sub-groups: the numbers are those of all of them together."""
    together = microadam(make_params(SHAPES), metrics_every=2)
    apart = microadam(make_params(SHAPES), metrics_every=2)
    groups, params = apart.param_groups, params_of(apart)
    for seed in range(4):
        train(together, [seed])
        for index, p in enumerate(params):
            apart.param_groups = [{**groups[0], "params": [p]}]
            p.grad = gradient(p, seed, index)
            apart.step()
    assert apart.metrics == pytest.approx(together.metrics, rel=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_on_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(SHAPES)]
        optimizer = microadam(params, metrics_every=1)
        for seed in range(5):
            for index, p in enumerate(params):
                p.grad = gradient(p.cpu(), seed, index).to(device)
            optimizer.step()
        found.append(optimizer.metrics)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
