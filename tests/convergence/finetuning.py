"""A small byte-level Llama, pre-trained on source, fine-tuned on English: `NUM_RUNS` runs at once.

The runs are stacked along a first dimension of every weight. Top-K blocks lie on the rows of that dimension, so no
block belongs to two runs, and each run is what it would be alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.optim import Optimizer

from tests.text import text

NUM_RUNS, NUM_STEPS = 8, 100
FIRST_SEED = 0
_BATCH, _SEQ_LEN = 2, 64
_PRETRAIN_STEPS = 300
_HELD_OUT = 64 * _SEQ_LEN
_SOURCES = ("argparse", "ast", "datetime", "decimal", "doctest", "inspect", "pickle", "tarfile", "typing")


def make_model() -> Any:
    """One layer, 86 thousand parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = json.loads((Path(__file__).parents[2] / "configs" / "models" / "byte-llama-1m.json").read_text())
    shape |= {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="eager"))  # vmap has no rule for the fused one


def pretrained() -> Any:
    """The model after some steps of AdamW on the source of the standard library."""
    folder = Path(os.__file__).parent
    data = _bytes("".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES))
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    _train(optimizer, _samples(data, (_PRETRAIN_STEPS, 8), seed=0), lambda batch: _loss(model(batch).logits, batch))
    return model


def fine_tune(model: Any, make_optimizer: Callable[[list[tuple[str, Tensor]]], Optimizer]) -> Tensor:
    """Held-out loss of every run, in nats per byte: (NUM_RUNS,). The batches do not depend on the optimizer."""
    data = text()
    weights = {
        name: param.detach().expand(NUM_RUNS, *param.shape).clone().requires_grad_()
        for name, param in model.named_parameters()
    }

    def losses(batch: Tensor, batch_dim: int | None) -> Tensor:
        def one(weights: dict[str, Tensor], batch: Tensor) -> Tensor:
            return _loss(functional_call(model, weights, (batch,)).logits, batch)

        return vmap(one, in_dims=(0, batch_dim))(weights, batch)

    batches = [
        _samples(data[:-_HELD_OUT], (NUM_STEPS, _BATCH), seed) for seed in range(FIRST_SEED, FIRST_SEED + NUM_RUNS)
    ]
    optimizer = make_optimizer(list(weights.items()))
    _train(optimizer, torch.stack(batches, dim=1), lambda batch: losses(batch, 0).sum())
    with torch.no_grad():
        return losses(data[-_HELD_OUT:].view(-1, _SEQ_LEN), None)


def _train(optimizer: Optimizer, batches: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
    """One step per batch; the learning rate rises for a tenth of them and then follows a cosine to 0."""
    from transformers import get_cosine_schedule_with_warmup

    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        schedule.step()


def _loss(logits: Tensor, batch: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def _samples(data: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Pieces of the text at random places: (*shape, _SEQ_LEN)."""
    starts = torch.randint(len(data) - _SEQ_LEN, (*shape, 1), generator=torch.Generator().manual_seed(seed))
    return data[starts + torch.arange(_SEQ_LEN)]


def _bytes(string: str) -> Tensor:
    return torch.tensor(list(string.encode()))
