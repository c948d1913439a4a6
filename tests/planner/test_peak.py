"""What real engines allocate in the backward pass and in the step, against the plan."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from microadam_dist.planner import memory
from microadam_dist.planner.engines import Engine, rank_shards
from microadam_dist.planner.memory import Job
from tests.deepspeed.engines import initialize, make_config
from tests.ranks import run_ranks

from .live import LiveBytes

WORLD_SIZE, NUM_LAYERS, WIDTH = 2, 16, 256
LAYER, NUMEL = WIDTH**2, NUM_LAYERS * WIDTH**2
BUCKET = 2 * LAYER
MASTER_FREE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def make_model(num_layers: int = NUM_LAYERS) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))


def _zero_peaks(rank: int, world_size: int, stage: int, master_free: bool) -> tuple[int, int]:
    """Peaks in the second step; SGD, whose update makes no tensors."""
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


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("master_free", [False, True], ids=["", "master-free"])
def test_zero(stage: int, master_free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if stage == 0 and master_free:
        pytest.skip("DeepSpeed has no such mode")
    monkeypatch.setattr(memory, "REDUCE_BUCKET", BUCKET if stage else NUMEL)  # stage 0 has a setting of its own
    job = Job(engine=Engine(f"zero{stage}"), gpus=WORLD_SIZE, master_free=master_free)
    units = [{str(layer): (WIDTH, WIDTH) for layer in range(NUM_LAYERS)}]
    shards = rank_shards(job.engine, units, WORLD_SIZE, 0, compute_bytes=2)
    gradients, step_gradients, step_buffers = memory._gradients(units, job, shards)
    buffers = memory._buffers(units, job)
    for backward, step in run_ranks(_zero_peaks, WORLD_SIZE, stage, master_free):
        if stage == 3:  # its gradients and its bucket stay between steps, and were there before
            step += 2 * NUMEL // WORLD_SIZE + step_buffers
        else:  # activations are less than 2 %
            assert 0.95 < (gradients + buffers) / backward < 1.05
        assert step == step_gradients + step_buffers


def _fsdp_peak(rank: int, world_size: int, engine: Engine) -> int:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    layers = [make_model(4) for _ in range(6)]
    model: Any = nn.Sequential(make_model(1), *layers).bfloat16()
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
    """And at least half of the buffers: how much overlaps depends on the device."""
    units = [{"root": (WIDTH, WIDTH)}, *({f"{i}.{j}": (WIDTH, WIDTH) for j in range(4)} for i in range(6))]
    job = Job(engine=engine, gpus=WORLD_SIZE, dtype=memory.Dtype.pure_bf16)
    shards = rank_shards(engine, units, WORLD_SIZE, 0, compute_bytes=2)
    gradients, *_ = memory._gradients(units, job, shards)
    buffers = memory._buffers(units, job)
    for peak in run_ranks(_fsdp_peak, WORLD_SIZE, engine):
        print(engine, peak, gradients, buffers)
        assert gradients + 0.4 * buffers < peak < gradients + buffers
