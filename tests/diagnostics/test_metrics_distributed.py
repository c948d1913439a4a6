"""The metrics of one process on any number of ranks, whatever shards the parameters, and no bit of the training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy

from microadam_dist import MicroAdam, release_gradients
from tests.deepspeed.engines import base_optimizer, initialize, make_config
from tests.distributed.models import (
    GivenGradients,
    assert_same,
    backward,
    everything,
    inject,
    make_model,
    make_optimizer,
    shard,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:FSDP")
STEPS = 8
Metrics = dict[str, float]


def close(metrics: Metrics) -> Any:
    """Sums of float64 in another order."""
    return pytest.approx(metrics, rel=1e-12)


@pytest.fixture(scope="module")
def expected() -> Metrics:
    model = make_model()
    optimizer = make_optimizer(model, metrics_every=4)
    train(model, optimizer, range(STEPS))
    return optimizer.metrics


# ---------------------------------------------------------------- FSDP2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fsdp2(world_size: int, expected: Metrics) -> None:
    for metrics in run_ranks(_fsdp2, world_size):
        assert metrics == [close(expected)] * len(metrics)


def _fsdp2(rank: int, world_size: int) -> list[Metrics]:
    found, weights = [], []
    for every in (4, 0):
        model = shard(make_model())
        optimizer = make_optimizer(model, metrics_every=every)
        train(model, optimizer, range(STEPS))
        found.append(optimizer.metrics)
        weights.append(everything(optimizer))
    assert_same(weights[0], weights[1])
    assert not found.pop()

    model = shard(make_model())
    optimizer = make_optimizer(model, metrics_every=4)
    release_gradients(model, optimizer)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
    return [*found, optimizer.metrics]


def test_hsdp_and_whole_parameters(expected: Metrics) -> None:
    """Whole on some ranks or on all of them, each element counts once."""
    for hybrid, mixed, num_skipped in run_ranks(_replicated, 4):
        assert hybrid == close(expected)
        assert mixed == close(expected)
        assert num_skipped == 3


def _replicated(rank: int, world_size: int) -> tuple[Metrics, Metrics, float]:
    from torch.distributed.fsdp import fully_shard

    partly = make_model()
    fully_shard(partly.embed)  # the others stay whole
    mixed = make_optimizer(partly, metrics_every=4)
    train(partly, mixed, range(STEPS))

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(make_model(), mesh=mesh)
    optimizer = make_optimizer(model, metrics_every=4)
    train(model, optimizer, range(STEPS))
    hybrid = optimizer.metrics
    inject(model, 0)
    model.embed.weight.grad.to_local()[:3, 0] = torch.nan if mesh["shard"].get_local_rank() else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):  # the gradient of embed is used once only
            optimizer.step()
            model.embed.weight.grad = None
    return hybrid, mixed.metrics, optimizer.metrics["nonfinite_blocks"]


# ---------------------------------------------------------------- DDP, FSDP1


def test_sharded_state_of_ddp(expected: Metrics) -> None:
    for touched, newest in run_ranks(_sharded_state, 2):
        for metrics in (touched, newest):
            assert 0 < metrics.pop("sent_bytes") < metrics.pop("dense_bytes")
        assert touched == close(expected)
        assert 0 < newest["q"] < 1  # other settings, see make_optimizer


def _sharded_state(rank: int, world_size: int) -> list[Metrics]:
    found = []
    for exchange in ("touched", "newest"):
        model = make_model()
        optimizer = make_optimizer(model, metrics_every=4, shard_state=True, weight_exchange=exchange)
        train(model, optimizer, range(STEPS))
        found.append(optimizer.metrics)
    return found


def test_fsdp1(expected: Metrics) -> None:
    """Shard edges cut blocks, so the numbers are not quite the same; without a cut they are."""
    ranks = run_ranks(_fsdp1, 2)
    assert ranks[0] == ranks[1]
    full, whole = ranks[0]
    assert whole == close(expected)
    assert full == pytest.approx(expected, rel=0.02)


def _fsdp1(rank: int, world_size: int) -> list[Metrics]:
    found = []
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        device = torch.device("cpu")
        model = FSDP(make_model(), use_orig_params=True, device_id=device, sharding_strategy=strategy)
        optimizer = make_optimizer(model, metrics_every=4)
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        found.append(optimizer.metrics)
    return found


# ---------------------------------------------------------------- DeepSpeed

UNCUT = {"embed": (64, 256), "odd": (64, 256)}  # ZeRO-1, 2 on two ranks: one each; ZeRO-3: half the rows of both


@pytest.mark.deepspeed
def test_zero() -> None:
    model, params = _zero_model(), {"density": 0.05, "window_size": 4, "lr": 1e-2, "metrics_every": 4}
    optimizer = MicroAdam(model.named_parameters(), **params)
    for step in range(STEPS):
        model(_zero_gradients(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ranks in zip(*run_ranks(_zero, 2, params), strict=True):
        assert ranks == (close(optimizer.metrics), close(optimizer.metrics))


def _zero_model() -> nn.Module:
    torch.manual_seed(0)
    return GivenGradients(UNCUT)


def _zero_gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in UNCUT.items()}


def _zero(rank: int, world_size: int, params: dict[str, Any]) -> list[Metrics]:
    found = []
    for stage, options in ((0, {}), (1, {}), (2, {}), (3, {}), (3, {"sub_group_size": 17000})):
        config = make_config(stage, torch.float32, params, zero_optimization=options)
        engine = initialize(_zero_model(), config)
        for step in range(STEPS):
            engine.backward(engine(_zero_gradients(step)))
            engine.step()
        found.append(base_optimizer(engine).metrics)
        engine.destroy()
    return found
