"""One rank's batch has a NaN: it poisons nothing, whoever notices it first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microadam_dist import MicroAdam
from tests.deepspeed.engines import (
    SETTINGS,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed


def gradients(rank: int) -> list[dict[str, Tensor]]:
    steps = make_gradients(6)
    if rank == 1:
        steps[2]["down"][0, 5] = float("nan")
        steps[2]["norm"][3] = float("inf")
    return steps


def _train(rank: int, world_size: int, stage: int) -> tuple[dict[str, Tensor], int]:
    engine = initialize(make_model(), make_config(stage, torch.float32))
    for grads in gradients(rank):
        engine.backward(engine(grads))
        engine.step()
    return full_weights(engine), base_optimizer(engine).num_nonfinite_blocks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_nan_on_one_rank_poisons_nothing(stage: int) -> None:
    """Stage 0: MicroAdam skips the block. ZeRO: DeepSpeed skips the step, because its gradient norm is not finite."""
    model = make_model()
    optimizer = MicroAdam(model.parameters(), **SETTINGS)
    for step, (mine, theirs) in enumerate(zip(gradients(0), gradients(1), strict=True)):
        if stage > 0 and step == 2:
            continue
        for name, holder in model.named_children():
            holder.weight.grad = (mine[name] + theirs[name]) / 2
        optimizer.step()
    expected = {name: holder.weight.detach() for name, holder in model.named_children()}
    assert all(weight.isfinite().all() for weight in expected.values())
    for weights, num_skipped in run_ranks(_train, 2, stage):
        assert num_skipped == optimizer.num_nonfinite_blocks == (2 if stage == 0 else 0)
        for name in ("down", "norm", "bias"):  # no shard edge cuts their blocks
            assert torch.equal(weights[name], expected[name])
        assert all(weight.isfinite().all() for weight in weights.values())
