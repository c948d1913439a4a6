"""Training on real text goes on after the number of ranks and the ZeRO stage have changed: 2 -> 4 -> 1 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import microadam_dist
from tests.deepspeed.engines import initialize, make_config
from tests.ranks import run_ranks
from tests.text import batch, held_out, tiny_llama

pytestmark = pytest.mark.deepspeed
# So few that chaos is small: weights changed by 1e-3 of themselves at both changes move the loss by 0.0011 (standard
# deviation of 6), which makes 0.0016 for a difference. Optimizer state that is lost at the second change moves it by
# 0.13, and makes it lower, as longer steps do so early: hence a distance to both sides.
STEPS = 8
SETTINGS = {"lr": 4e-3, "window_size": 2, "density": 0.05}


def _train(rank: int, world_size: int, stage: int, first: int, load: str | None, save: str | None) -> float:
    model = tiny_llama()
    engine: Any = initialize(model, make_config(stage, torch.bfloat16, params=SETTINGS))
    if load is not None:
        microadam_dist.deepspeed.load_checkpoint(engine, load)
        assert engine.global_steps == first
    last = first + STEPS if save else 3 * STEPS
    for step in range(first, last):
        mine = batch(step)[rank::world_size]
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
    if save is not None:
        engine.save_checkpoint(save)
    with torch.no_grad():
        loss = engine(input_ids=held_out(), labels=held_out()).loss.float()
    dist.all_reduce(loss)
    engine.destroy()
    return float(loss) / world_size


def test_heldout_loss_is_that_of_the_uninterrupted_run(tmp_path: Path) -> None:
    at_2, at_4 = str(tmp_path / "at-2"), str(tmp_path / "at-4")
    before = run_ranks(_train, 2, 2, 0, None, at_2)[0]
    run_ranks(_train, 4, 3, STEPS, at_2, at_4)
    changed = run_ranks(_train, 1, 2, 2 * STEPS, at_4, None)[0]
    straight = run_ranks(_train, 2, 2, 0, None, None)[0]
    print(
        f"held-out: {before:.4f} after {STEPS} steps, {straight:.4f} after {3 * STEPS}, {changed:.4f} with two changes"
    )
    assert straight < before - 0.1
    assert abs(changed - straight) < 0.01
