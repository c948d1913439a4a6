"""Every ZeRO stage against one plain process, the same reduced gradients: equal bits in every block that is not cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.deepspeed.cuts import cut_intervals, plain_weights, uncut_masks
from tests.deepspeed.engines import (
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
NUM_STEPS = 20


def _train_stages(rank: int, world_size: int, configs: list[tuple[int, str, dict[str, Any]]]) -> list[Any]:
    results = []
    for stage, dtype_name, extra in configs:
        dtype = getattr(torch, dtype_name)
        engine = initialize(make_model(), make_config(stage, dtype, **extra))
        train(engine, make_gradients(NUM_STEPS, dtype))
        optimizer = base_optimizer(engine)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, cut_intervals(optimizer.sharded._layouts.values()))
        results.append((full_weights(engine), [cut for cuts in gathered for cut in cuts], optimizer.state_bytes()))
        engine.destroy()
    return results


# Rounded stochastically, by positions that ranks and stages do not change.
MASTER_FREE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
CONFIGS: list[tuple[int, str, dict[str, Any]]] = [
    (0, "float32", {}),
    (1, "float32", {}),
    (2, "float32", {}),
    (3, "float32", {}),
    (2, "float32", {"zero_optimization": {"round_robin_gradients": True}}),
    (3, "float32", {"zero_optimization": {"sub_group_size": 9000}}),
    (0, "bfloat16", {}),
    (1, "bfloat16", {}),
    (1, "bfloat16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    (2, "bfloat16", {}),
    (3, "bfloat16", {}),
    (1, "bfloat16", {"bf16": MASTER_FREE}),
    (2, "bfloat16", {"bf16": MASTER_FREE}),
    (3, "bfloat16", {"bf16": MASTER_FREE, "zero_optimization": {"sub_group_size": 9000}}),
]


@pytest.fixture(scope="module", params=[2, 4])
def trained(request: pytest.FixtureRequest) -> tuple[int, list[list[Any]]]:
    world_size = request.param
    return world_size, run_ranks(_train_stages, world_size, CONFIGS)


@pytest.mark.parametrize("index", range(len(CONFIGS)), ids=[f"zero{s}-{d}-{i}" for i, (s, d, _) in enumerate(CONFIGS)])
def test_uncut_blocks_are_bit_identical_to_one_process(trained: tuple[int, list[list[Any]]], index: int) -> None:
    world_size, results = trained
    stage, dtype_name, extra = CONFIGS[index]
    has_master = extra.get("bf16") != MASTER_FREE
    expected = plain_weights(getattr(torch, dtype_name), NUM_STEPS, has_master)
    for rank in range(world_size):
        weights, cuts, _ = results[rank][index]
        uncut = uncut_masks(weights, cuts)
        for name in expected:
            got, want = weights[name].flatten()[uncut[name]], expected[name].flatten()[uncut[name]]
            assert torch.equal(got, want), f"{name} on rank {rank}"
        if rank == 0:
            cut_share = 1 - sum(int(u.sum()) for u in uncut.values()) / sum(u.numel() for u in uncut.values())
            print(
                f"ZeRO-{stage} {dtype_name}, {world_size} ranks: {cut_share:.1%} of weights in {len(cuts)} fragments",
                cuts,
            )
    # ZeRO-1 and 2 cut at most (ranks - 1) blocks of the one flat buffer, ZeRO-3 that many of each parameter.
    most_cut = {0: 0, 1: world_size - 1, 2: world_size - 1, 3: 4 * (world_size - 1)}[stage]
    assert len(results[0][index][1]) <= 2 * most_cut


def test_state_is_sharded_and_norms_are_dense(trained: tuple[int, list[list[Any]]]) -> None:
    world_size, results = trained
    shapes = {name: p.shape for name, p in make_model().named_parameters()}
    dense = sum(shape.numel() for shape in shapes.values() if len(shape) == 1)
    sparse = sum(shape.numel() for shape in shapes.values()) - dense
    for index, (stage, _, _) in enumerate(CONFIGS):
        per_rank = [results[rank][index][2] for rank in range(world_size)]
        copies = world_size if stage == 0 else 1
        assert sum(state.sparse_numel for state in per_rank) == copies * sparse
        assert sum(state.dense_numel for state in per_rank) == copies * dense
        assert sum(state.dense_bytes for state in per_rank) == copies * dense * 8
