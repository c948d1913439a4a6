"""Bytes of activations of a Llama-like model in training.

The method is that of Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198, section 4: add up what each operation keeps for its backward pass. Their layer (GELU MLP, dropout,
softmax matrix kept) is replaced by that of transformers' Llama with `scaled_dot_product_attention`, whose fused kernels
keep queries, keys, values, output and one number a head, and no attention matrix. Without a padding mask, a fused loss
or fused norms; `tests/planner/test_activations.py` counts the tensors of real models.

Symbols: h hidden, q and k widths of the query and of the key projection, a query heads, i intermediate, V vocabulary,
c bytes of an element in matrix products, r in the residual stream (4 with autocast, else c).

    bytes per token   layer   2 norms             2 * ((4 + r) h + 4)   input in fp32, normalized, 1 / rms
                            their outputs       2 c h                 inputs of q, k, v and of gate, up
                                                5 c h                 with autocast: each product casts its own
                            attention           c (2 q + 2 k) + 4 a   queries, output, keys, values, log-sum-exp
                            MLP                 4 c i                 gate, silu(gate), up, their product
                    head    last norm           (4 + r) h + 4 + c h
                    loss    logits              c V                   kept by the caller until the backward pass ends
                            cross entropy       3 * 4 V               log-softmax and two gradients, in fp32

The backward pass of a layer needs c (2 i + h) more for the gradients of its widest activations.
With checkpointing a layer keeps r h, its input, and one layer at a time is recomputed; offloaded, one input is on the
device, the others in host memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import LlamaShape

CHUNK_LOGITS = 2**24  # at a time: with their gradient 0.22 GiB, less than recomputing a layer of a 7B Llama takes


def default_loss_chunk(vocab_size: int) -> int:
    """Tokens whose logits exist at a time in ``launch/train.py --single-gpu``: 524 of Llama 2, 130 of Llama 3."""
    return max(1, CHUNK_LOGITS // vocab_size)


@dataclass(frozen=True)
class Activations:
    """Bytes at the peak of the backward pass.

    Attributes:
        saved: What the forward pass keeps of all layers.
        logits: Logits, loss and their gradients, at the beginning of the backward pass.
        working: What the backward pass of one layer (recomputed, with checkpointing) needs beyond the bytes of the head
            and the loss, which are free by then except the logits.
        host: In host memory.
    """

    saved: int
    logits: int
    working: int
    host: int = 0

    @property
    def total(self) -> int:
        """All that is on the device."""
        return self.saved + self.logits + self.working


def activations(
    shape: LlamaShape,
    *,
    batch: int,
    seq: int,
    compute_bytes: int,
    autocast: bool,
    checkpointing: bool,
    offload: bool = False,
    loss_chunk: int | None = None,
) -> Activations:
    """What one micro-batch takes.

    Args:
        shape: The model.
        batch: Sequences.
        seq: Tokens of a sequence.
        compute_bytes: Bytes of an element in matrix products.
        autocast: Weights and residual stream are fp32, matrix products are not.
        checkpointing: Every layer is recomputed in the backward pass.
        offload: With checkpointing, the inputs of layers wait for that in host memory.
        loss_chunk: Tokens whose logits exist at a time (chunked cross entropy); all of them by default.
    """
    tokens, c, h = batch * seq, compute_bytes, shape.hidden
    r = 4 if autocast else c
    norm = (4 + r) * h + 4
    projection_inputs = (5 if autocast else 2) * c * h
    attention = c * (2 * shape.query_hidden + 2 * shape.kv_hidden) + 4 * shape.num_heads
    layer = 2 * norm + projection_inputs + attention + 4 * c * shape.intermediate
    rotary = 2 * r * shape.head_dim * seq
    head = tokens * (norm + c * h)
    kept = r * h if checkpointing else layer
    layers_kept = 1 if offload else shape.num_layers
    saved = tokens * layers_kept * kept + head + rotary

    logit_tokens = min(loss_chunk or tokens, tokens)
    held = 0 if loss_chunk else tokens * c * shape.vocab
    chunk_gradient = tokens * c * h if loss_chunk else 0  # of the last hidden states, computed chunk by chunk
    logits = logit_tokens * (c + 12) * shape.vocab + chunk_gradient
    backward = tokens * c * (2 * shape.intermediate + h)
    if checkpointing:
        backward += tokens * (layer - (r * h if r == 4 else 0))  # an fp32 input is kept already
    host = tokens * shape.num_layers * kept if offload else 0
    return Activations(saved, logits, working=max(0, held + backward - head - logits), host=host)
