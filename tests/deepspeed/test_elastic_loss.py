"""Training on real text goes on after the number of ranks and the ZeRO stage have changed: 2 -> 4 -> 1 ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import microadam_dist
from tests.deepspeed.engines import initialize, make_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
GLOBAL_BATCH, SEQ_LEN, STEPS = 4, 128, 20
SETTINGS = {"lr": 4e-3, "window_size": 2, "density": 0.05}


def text() -> torch.Tensor:
    """Bytes of the English texts of `help()`."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.long)


def batch(step: int) -> torch.Tensor:
    """The same sequences for a step, however many ranks share them: (GLOBAL_BATCH, SEQ_LEN)."""
    data = text()[:-20_000]
    starts = torch.randint(len(data) - SEQ_LEN, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[start : start + SEQ_LEN] for start in starts.tolist()])


def _train(rank: int, world_size: int, stage: int, first: int, load: str | None, save: str | None) -> float:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = json.loads((Path(__file__).parents[2] / "configs" / "models" / "byte-llama-1m.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 64, "intermediate_size": 192}))
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
    heldout = text()[-20_000:][: 64 * SEQ_LEN].view(64, SEQ_LEN)
    with torch.no_grad():
        loss = engine(input_ids=heldout, labels=heldout).loss.float()
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
