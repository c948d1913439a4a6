"""What real engines allocate in the backward pass and in the step, against the plan."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from bench.live_bytes import LiveBytes
from microadam_dist.planner import memory
from microadam_dist.planner.engines import Engine, rank_shards
from microadam_dist.planner.memory import Job
from tests.deepspeed.engines import initialize, make_config
from tests.ranks import run_ranks

WORLD_SIZE, NUM_LAYERS, WIDTH = 2, 16, 256
LAYER, NUMEL = WIDTH**2, NUM_LAYERS * WIDTH**2
BUCKET = 2 * LAYER
MODES = [(stage, master_free) for stage in range(4) for master_free in (False, True) if stage or not master_free]
MASTER_FREE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def make_model(num_layers: int = NUM_LAYERS) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))


def _zero_peaks(rank: int, world_size: int) -> dict[tuple[int, bool], tuple[int, int]]:
    """Mode -> peaks of the backward pass and of the step, second time; SGD, whose update makes no tensors."""
    return {mode: _zero_peak(*mode) for mode in MODES}


def _zero_peak(stage: int, master_free: bool) -> tuple[int, int]:
    model = make_model().bfloat16()
    zero = {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    config = make_config(stage, torch.bfloat16, zero_optimization=zero, bf16=MASTER_FREE if master_free else {})
    config["zero_allow_untested_optimizer"] = True
    engine = initialize(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False))
    for _ in range(2):
        gc.collect()
        with LiveBytes() as live:
            engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum())
            backward, live.peak = live.peak, live.now
            engine.step()
    engine.destroy()
    return backward, live.peak


@pytest.fixture(scope="module")
def zero_peaks() -> list[dict[tuple[int, bool], tuple[int, int]]]:
    return run_ranks(_zero_peaks, WORLD_SIZE)


@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "master_free"), MODES)
def test_zero(stage: int, master_free: bool, zero_peaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "REDUCE_BUCKET", BUCKET if stage else NUMEL)  # stage 0 has a setting of its own
    job = Job(engine=Engine(f"zero{stage}"), gpus=WORLD_SIZE, master_free=master_free)
    units = [{str(layer): (WIDTH, WIDTH) for layer in range(NUM_LAYERS)}]
    shards = rank_shards(job.engine, units, WORLD_SIZE, 0, compute_bytes=2)
    gradients, step_gradients, step_buffers = memory.gradient_bytes(units, job, shards)
    in_backward = gradients + memory.buffer_bytes(units, job)
    backward, step = (max(peaks) for peaks in zip(*(peaks[stage, master_free] for peaks in zero_peaks), strict=True))
    if stage == 3:  # its gradients and its bucket stay between steps, and were there before
        step += 2 * NUMEL // WORLD_SIZE + step_buffers
    else:
        assert 0.95 * backward < in_backward < 1.1 * backward
    assert 0 <= step - (step_gradients + step_buffers) < 100  # norms and flags


def _fsdp_peak(rank: int, world_size: int, engine: Engine) -> int:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = [make_model(4) for _ in range(6)]
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), *layers).bfloat16()
    if engine is Engine.fsdp2:
        for layer in layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        policy = ModuleWrapPolicy({nn.Sequential})
        device = torch.device("cpu")
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=device, auto_wrap_policy=policy)
    for _ in range(2):
        model.zero_grad()
        gc.collect()
        with LiveBytes() as live:
            model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()
    return live.peak


@pytest.mark.parametrize("engine", [Engine.fsdp1, Engine.fsdp2])
def test_fsdp_needs_no_more_than_planned(engine: Engine) -> None:
    units = [{"root": (WIDTH, WIDTH)}, *({f"{i}.{j}": (WIDTH, WIDTH) for j in range(4)} for i in range(6))]
    job = Job(engine=engine, gpus=WORLD_SIZE, dtype=memory.Dtype.pure_bf16)
    shards = rank_shards(engine, units, WORLD_SIZE, 0, compute_bytes=2)
    gradients, *_ = memory.gradient_bytes(units, job, shards)
    buffers = memory.buffer_bytes(units, job)
    for peak in run_ranks(_fsdp_peak, WORLD_SIZE, engine):
        assert gradients < peak < gradients + buffers  # how much overlaps depends on the device
