"""Bytes of optimizer state for a list of parameter shapes. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..config import MicroAdamConfig
from ..layout import ShardSpan, StateLayout, zero3_shard, zero12_shard

# Bytes of state a parameter of the optimizers MicroAdam is compared with.
ADAMW_FP32_BYTES = 8.0  # two fp32 moments
ADAMW_BF16_BYTES = 4.0  # two moments in the dtype of bf16 weights
ADAMW_8BIT_BYTES = 2 * (1 + 4 / 256)  # two 8-bit moments, one fp32 scale per 256 of them


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama that decide its parameter shapes."""

    hidden: int
    intermediate: int
    num_layers: int
    vocab: int
    kv_hidden: int
    """Width of the key and value projections: num_key_value_heads * head_dim."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, named as in transformers."""
        h, kv, i = self.hidden, self.kv_hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, h)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes |= {
                f"{prefix}self_attn.q_proj.weight": (h, h),
                f"{prefix}self_attn.k_proj.weight": (kv, h),
                f"{prefix}self_attn.v_proj.weight": (kv, h),
                f"{prefix}self_attn.o_proj.weight": (h, h),
                f"{prefix}mlp.gate_proj.weight": (i, h),
                f"{prefix}mlp.up_proj.weight": (i, h),
                f"{prefix}mlp.down_proj.weight": (h, i),
                f"{prefix}input_layernorm.weight": (h,),
                f"{prefix}post_attention_layernorm.weight": (h,),
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab, h)}


LLAMAS = {
    "Llama-2 7B": LlamaShape(hidden=4096, intermediate=11008, num_layers=32, vocab=32000, kv_hidden=4096),
    "Llama-2 13B": LlamaShape(hidden=5120, intermediate=13824, num_layers=40, vocab=32000, kv_hidden=5120),
    "Llama-3 8B": LlamaShape(hidden=4096, intermediate=14336, num_layers=32, vocab=128256, kv_hidden=1024),
}


@dataclass(frozen=True)
class StateMemory:
    """Parameters and state bytes on the two paths."""

    sparse_numel: int
    sparse_bytes: int
    dense_numel: int
    dense_bytes: int

    @property
    def numel(self) -> int:
        """All parameters."""
        return self.sparse_numel + self.dense_numel

    @property
    def total_bytes(self) -> int:
        """All state."""
        return self.sparse_bytes + self.dense_bytes


def whole_parameter_layouts(shapes: Mapping[str, tuple[int, ...]], config: MicroAdamConfig) -> Iterable[StateLayout]:
    """The layouts of unsharded parameters."""
    for name, shape in shapes.items():
        yield StateLayout((ShardSpan(name, shape, start=0, numel=math.prod(shape)),), config)


def state_memory(layouts: Iterable[StateLayout]) -> StateMemory:
    """What `MicroAdam` allocates for these local tensors."""
    totals = [0, 0, 0, 0]
    for layout in layouts:
        parts = (layout.sparse_numel, layout.sparse_bytes, layout.dense_numel, layout.dense_bytes)
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    return StateMemory(*totals)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank while the optimizer steps.

    Attributes:
        weights: The module's weights.
        gradients: The gradients handed to the optimizer.
        master: Copies of the weights that the optimizer updates in their place.
        optimizer: Its state.
    """

    weights: int
    gradients: int
    master: int
    optimizer: int


def zero_memory(
    shapes: Mapping[str, tuple[int, ...]],
    config: MicroAdamConfig,
    stage: int,
    world_size: int,
    rank: int,
    *,
    weight_bytes: int,
    master_bytes: int,
) -> RankMemory:
    """What DeepSpeed holds on one rank for one param group.

    Args:
        shapes: Name -> shape of the trained parameters.
        config: Settings of the group.
        stage: ZeRO stage, 0 to 3.
        world_size: Data-parallel ranks.
        rank: Which one.
        weight_bytes: Bytes of a weight of the module.
        master_bytes: Bytes of a master weight, whose gradient has as many; 0: the optimizer updates the weights
            themselves (stage 0 with fp32 weights, or with a model that was cast to bf16).
    """
    if stage == 0:
        numel = sum(map(math.prod, shapes.values()))
        optimizer = state_memory(whole_parameter_layouts(shapes, config)).total_bytes
        return RankMemory(weight_bytes * numel, (master_bytes or weight_bytes) * numel, master_bytes * numel, optimizer)
    shard = (zero3_shard if stage == 3 else zero12_shard)(shapes, world_size, rank)
    held = shard.numel * (1 if stage == 3 else world_size)
    optimizer = state_memory([StateLayout(shard.spans, config)]).total_bytes
    return RankMemory(weight_bytes * held, master_bytes * shard.numel, master_bytes * shard.numel, optimizer)
