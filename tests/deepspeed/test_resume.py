"""`save_checkpoint` / `load_checkpoint` on the same ranks: all following losses, weights and state, bit for bit."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deepspeed.engines import GivenGradients, base_optimizer, full_weights
from tests.deepspeed.matrix import TORCH_DTYPES, Row, make_engine, require_dtype, rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
# Steps; the window has 4 slots. Every parameter has a gradient in step 6: under ZeRO-3 DeepSpeed 0.19.8 steps a
# parameter without gradient with its previous one, which no checkpoint holds.
BEFORE, AFTER = 6, 2
ROWS = [row for row in rows() if row.feature.error is None]


def train(engine: Any, row: Row, rank: int, steps: range) -> list[float]:
    """Losses of the steps; each has gradients of its own, whatever ran before."""
    losses = []
    dtype = torch.bfloat16 if "pre-cast" in row.feature.traits else TORCH_DTYPES[row.dtype]
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        for _ in range(row.feature.config.get("gradient_accumulation_steps", 1)):
            grads = {n: torch.randn(s, generator=generator).to(dtype) for n, s in GivenGradients.SHAPES.items()}
            if "missing gradients" in row.feature.traits and step % 2:
                del grads["down"], grads["norm"]
            loss = engine(grads)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    return losses


def everything(engine: Any) -> list[Tensor]:
    """Weights, and state in the order in which it was created."""
    state = [tensor for state in base_optimizer(engine).state.values() for tensor in state.values()]
    return [*full_weights(engine).values(), *state]


def _resume(rank: int, world_size: int, folder: str, dtype: str) -> dict[str, bool]:
    same = {}
    for row in ROWS:
        if row.dtype != dtype:
            continue
        engine = make_engine(row)
        train(engine, row, rank, range(BEFORE))
        engine.save_checkpoint(os.path.join(folder, str(row)))
        losses = train(engine, row, rank, range(BEFORE, BEFORE + AFTER))
        resumed = make_engine(row)
        resumed.load_checkpoint(os.path.join(folder, str(row)))
        resumed_losses = train(resumed, row, rank, range(BEFORE, BEFORE + AFTER))
        pairs = list(zip(everything(engine), everything(resumed), strict=True))
        same[str(row)] = losses == resumed_losses and all(torch.equal(*pair) for pair in pairs) and len(pairs) > 8
        engine.destroy()
        resumed.destroy()
    return same


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, bool]]]:
    """By rank, whether each row of a dtype goes on as without the interruption; its ranks run once."""

    @functools.cache
    def of(dtype: str) -> list[dict[str, bool]]:
        require_dtype(dtype)
        return run_ranks(_resume, 2, str(tmp_path_factory.mktemp(dtype)), dtype)

    return of


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_resume_is_exact(row: Row, results: Callable[[str], list[dict[str, bool]]]) -> None:
    assert [same[str(row)] for same in results(row.dtype)] == [True, True]
