"""Activations of real models: what autograd saves, counted, and the peak of live tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from microadam_dist.planner.activations import Activations, activations
from microadam_dist.planner.shapes import shape_from_config

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

BATCH, SEQ = 2, 96  # as many tokens as no matrix has rows or columns
FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS = {
    "llama": FIELDS,
    "grouped queries": FIELDS | {"num_key_value_heads": 1},
    "wide heads": FIELDS | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 192},
    "qwen2": FIELDS | {"model_type": "qwen2", "tie_word_embeddings": True},
    "small vocabulary": FIELDS | {"vocab_size": 60},
}
MODES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def make_model(fields: dict[str, Any], dtype: torch.dtype, checkpointing: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields, use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def forward(model: Any) -> Any:
    ids = torch.randint(0, model.config.vocab_size, (BATCH, SEQ))
    return model(input_ids=ids, labels=ids)


def planned(fields: dict[str, Any], dtype: torch.dtype, autocast: bool, checkpointing: bool) -> Activations:
    return activations(
        shape_from_config(fields),
        batch=BATCH,
        seq=SEQ,
        compute_bytes=2 if autocast else dtype.itemsize,
        autocast=autocast,
        checkpointing=checkpointing,
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_tensors(name: str, mode: str, checkpointing: bool) -> None:
    """Storages that autograd saves and that are no parameters, nor casts of them, within 1 %."""
    dtype, autocast = MODES[mode]
    model = make_model(MODELS[name], dtype, checkpointing)
    weights = {tuple(sorted(p.shape)) for p in model.parameters() if p.dim() == 2} if autocast else set()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_cast = tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and tuple(sorted(tensor.shape)) in weights
        if tensor.untyped_storage().data_ptr() not in parameters and not is_cast:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        outputs = forward(model)
    assert outputs.loss.requires_grad
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    log_softmax = 4 * BATCH * SEQ * MODELS[name]["vocab_size"]
    if checkpointing:  # the rotary tables are arguments of the recomputation, which autograd does not see
        counted += 2 * (4 if autocast else dtype.itemsize) * shape_from_config(MODELS[name]).head_dim * SEQ
    got = planned(MODELS[name], dtype, autocast, checkpointing)
    assert got.saved + log_softmax == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_peak_of_live_tensors(name: str, mode: str, checkpointing: bool) -> None:
    """Everything but the weights at the peak of a step that releases gradients, as torch's tracker sees it."""
    dtype, _ = MODES[mode]
    model = make_model(MODELS[name], dtype, checkpointing)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        outputs = forward(model)
        outputs.loss.backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    measured = peak["Total"] - sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    got = planned(MODELS[name], dtype, False, checkpointing).total
    assert 0.97 * (measured - largest) < got < 1.03 * measured  # none to one gradient lives at the peak
