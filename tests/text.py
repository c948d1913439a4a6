"""Real text and a tiny Llama for tests that compare held-out losses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GLOBAL_BATCH, SEQ_LEN = 4, 128
_HELD_OUT_BYTES = 20_000


@functools.cache
def text() -> Tensor:
    """Bytes of the English texts of `help()`."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.long)


def batch(step: int) -> Tensor:
    """The same sequences for a step, however many ranks share them: (GLOBAL_BATCH, SEQ_LEN)."""
    data = text()[:-_HELD_OUT_BYTES]
    starts = torch.randint(len(data) - SEQ_LEN, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[start : start + SEQ_LEN] for start in starts.tolist()])


def held_out() -> Tensor:
    """(64, SEQ_LEN), not in any batch."""
    return text()[-_HELD_OUT_BYTES:][: 64 * SEQ_LEN].view(64, SEQ_LEN)


def tiny_llama() -> Any:
    """A byte-level Llama of a quarter million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = json.loads((Path(__file__).parents[1] / "configs" / "models" / "byte-llama-1m.json").read_text())
    return LlamaForCausalLM(LlamaConfig(**{**config, "hidden_size": 64, "intermediate_size": 192}))
