"""Bytes on each rank in every mode, as allocated, against the planner's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microadam_dist import MicroAdamConfig
from microadam_dist.planner.engines import Engine, Precision
from tests.deepspeed.engines import SETTINGS, base_optimizer, initialize, make_config, make_gradients, make_model, train
from tests.planner.rank_memory import RankMemory, rank_memory
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
WORLD_SIZE = 3
# The parameters the model would keep whole on every rank under ZeRO-3 are partitioned too, so that the sums are plain.
ALL_PARTITIONED = {"stage3_param_persistence_threshold": 0}
MASTER_FREE = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}

# name: stage, dtype section, more configuration, bytes of a weight, bytes of a master weight
MODES: dict[str, tuple[int, torch.dtype, dict[str, Any], int, int]] = {
    "zero0 fp32": (0, torch.float32, {}, 4, 0),
    "zero0 bf16": (0, torch.bfloat16, {}, 2, 4),
    "zero0 pre-cast to bf16": (0, torch.float32, {}, 2, 0),
    "zero1 fp32": (1, torch.float32, {}, 4, 4),
    "zero2 fp32": (2, torch.float32, {}, 4, 4),
    "zero3 fp32": (3, torch.float32, {}, 4, 4),
    "zero1 bf16": (1, torch.bfloat16, {}, 2, 4),
    "zero2 bf16": (2, torch.bfloat16, {}, 2, 4),
    "zero3 bf16": (3, torch.bfloat16, {}, 2, 4),
    "zero1 bf16 master-free": (1, torch.bfloat16, MASTER_FREE, 2, 2),
    "zero2 bf16 master-free": (2, torch.bfloat16, MASTER_FREE, 2, 2),
    "zero3 bf16 master-free": (3, torch.bfloat16, MASTER_FREE, 2, 2),
}


def _measure(rank: int, world_size: int) -> dict[str, RankMemory]:
    measured = {}
    for name, (stage, dtype, extra, weight_bytes, master_bytes) in MODES.items():
        zero = {"zero_optimization": ALL_PARTITIONED} if stage == 3 else {}
        model = make_model(torch.bfloat16 if weight_bytes == 2 else torch.float32)
        engine = initialize(model, make_config(stage, dtype, **extra, **zero))
        optimizer = base_optimizer(engine)
        seen: dict[str, int] = {}

        def look(optimizer: Any, args: Any, kwargs: Any, seen: dict[str, int] = seen) -> None:
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            seen["gradients"] = sum(p.grad.nbytes for p in tensors)
            seen["stepped"] = sum(p.nbytes for p in tensors)

        optimizer.register_step_pre_hook(look)
        train(engine, make_gradients(2, torch.bfloat16 if weight_bytes == 2 else dtype))
        params = list(engine.module.parameters())
        if stage == 3:
            weights = sum(p.ds_tensor.nbytes for p in params)
        else:  # views of the flat buffer of ZeRO-1 and 2, whose padding counts
            weights = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in params}.values())
        state = optimizer.state_bytes()
        measured[name] = RankMemory(
            weights,
            seen["gradients"],
            seen["stepped"] if master_bytes else 0,
            state.sparse_bytes + state.dense_bytes,
        )
        engine.destroy()
    return measured


@pytest.fixture(scope="module")
def measured() -> list[dict[str, RankMemory]]:
    return run_ranks(_measure, WORLD_SIZE)


@pytest.mark.parametrize("mode", MODES)
def test_allocated_bytes_are_the_planned_ones(mode: str, measured: list[dict[str, RankMemory]]) -> None:
    stage, _, _, weight_bytes, master_bytes = MODES[mode]
    shapes = {name: tuple(p.shape) for name, p in make_model().named_parameters()}
    numel = sum(p.numel() for p in make_model().parameters())
    for rank in range(WORLD_SIZE):
        got = measured[rank][mode]
        precision = Precision(weight_bytes, master_bytes, compute=weight_bytes)
        config = MicroAdamConfig(**SETTINGS)
        planned = rank_memory(Engine(f"zero{stage}"), [shapes], config, WORLD_SIZE, rank, precision)
        assert got == planned, f"rank {rank}"
        per_param = {part: round(size / numel, 3) for part, size in vars(got).items()}
        print(f"{mode}, rank {rank} of {WORLD_SIZE}, bytes per parameter of the model: {per_param}")
