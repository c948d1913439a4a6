"""Cross-entropy of a causal language model without its logits: some tokens at a time, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from microadam_dist.planner.shapes import SUPPORTED_MODEL_TYPES

from .errors import UserError
from .packing import IGNORED


def use_chunked_loss(model: PreTrainedModel, chunk: int) -> None:
    """Make ``model(..., labels=...)`` return the loss alone, as `ForCausalLMLoss` of transformers defines it.

    Without labels it is called as before.

    Args:
        model: A Llama-like model: its logits are those of ``lm_head`` on what ``model.model`` returns, unscaled.
        chunk: Tokens whose logits exist at a time.

    Raises:
        UserError: The model is of another kind.
    """
    if model.config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"the chunked loss supports {', '.join(SUPPORTED_MODEL_TYPES)}, not '{model.config.model_type}': install "
            "liger-kernel, which has more models, and leave out --loss-chunk"
        )
    plain_forward = model.forward

    def forward(
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if labels is None:
            return plain_forward(input_ids=input_ids, **kwargs)
        hidden = model.model(input_ids=input_ids, **kwargs).last_hidden_state
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].flatten()  # tokens before n predict n
        total = ChunkedCrossEntropy.apply(hidden.flatten(0, -2), model.lm_head.weight, targets, chunk)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    model.forward = forward


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of ``hidden @ weight.T``.

    Logits are computed twice instead of kept. The gradient of the weights is one tensor, to which the chunks are added:
    left to autograd, those of two chunks would exist together.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """Return the fp32 sum of (tokens, width) states, (vocab, width) weights and (tokens,) targets."""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        total = torch.zeros((), device=hidden.device)
        for states, labels in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            total += _sum_of_losses(states @ weight.T, labels)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Return the gradients of states and weights."""
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunks = (tensor.split(ctx.chunk) for tensor in (hidden, targets, grad_hidden))
        for states, labels, grad_states in zip(*chunks, strict=True):
            grad_logits = _gradient_of_logits(states @ weight.T, labels, grad_total)
            torch.mm(grad_logits, weight, out=grad_states)
            grad_weight.addmm_(grad_logits.T, states)
            del grad_logits  # before those of the next chunk are made
        return grad_hidden, grad_weight, None, None


def _sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def _gradient_of_logits(logits: Tensor, targets: Tensor, grad_total: Tensor) -> Tensor:
    logits.requires_grad_()
    with torch.enable_grad():
        loss = _sum_of_losses(logits, targets)
    (gradient,) = torch.autograd.grad(loss, logits, grad_total)
    return gradient
