"""Shapes of Llama-like models: built in, or read from a Hugging Face ``config.json``. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Shapes = dict[str, tuple[int, ...]]
SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """The sizes of a Llama that decide its parameter shapes and activations.

    Attributes:
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        num_layers: Decoder layers.
        vocab: Rows of the embedding.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer with grouped-query attention.
        head_dim: Width of a head.
        tied: The output projection is the embedding.
        qkv_bias, out_bias, mlp_bias: Which projections have a bias.
    """

    hidden: int
    intermediate: int
    num_layers: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def query_hidden(self) -> int:
        """Width of the query projection and of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def kv_hidden(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    def parameters(self) -> Shapes:
        """Name -> shape of every parameter, named as in transformers."""
        return {name: shape for unit in self.units() for name, shape in unit.items()}

    def units(self) -> list[Shapes]:
        """The same, by FSDP unit: first what lies outside the decoder layers, then one unit a layer."""
        root: Shapes = {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }
        if self.tied:
            del root["lm_head.weight"]
        return [root, *(self._layer(f"model.layers.{layer}.") for layer in range(self.num_layers))]

    def _layer(self, prefix: str) -> Shapes:
        h, q, kv, i = self.hidden, self.query_hidden, self.kv_hidden, self.intermediate
        projections = {
            "self_attn.q_proj": ((q, h), self.qkv_bias),
            "self_attn.k_proj": ((kv, h), self.qkv_bias),
            "self_attn.v_proj": ((kv, h), self.qkv_bias),
            "self_attn.o_proj": ((h, q), self.out_bias),
            "mlp.gate_proj": ((i, h), self.mlp_bias),
            "mlp.up_proj": ((i, h), self.mlp_bias),
            "mlp.down_proj": ((h, i), self.mlp_bias),
        }
        shapes: Shapes = {}
        for name, (shape, has_bias) in projections.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        return shapes | {
            f"{prefix}input_layernorm.weight": (h,),
            f"{prefix}post_attention_layernorm.weight": (h,),
        }


def numel(shapes: Shapes) -> int:
    """Elements of all of them."""
    return sum(map(math.prod, shapes.values()))


def _llama(hidden: int, intermediate: int, num_layers: int, vocab: int, heads: int, kv_heads: int) -> LlamaShape:
    return LlamaShape(
        hidden=hidden,
        intermediate=intermediate,
        num_layers=num_layers,
        vocab=vocab,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
    )


LLAMAS = {
    "Llama-2 7B": _llama(4096, 11008, 32, 32000, heads=32, kv_heads=32),
    "Llama-2 13B": _llama(5120, 13824, 40, 32000, heads=40, kv_heads=40),
    "Llama-2 70B": _llama(8192, 28672, 80, 32000, heads=64, kv_heads=8),
    "Llama-3 8B": _llama(4096, 14336, 32, 128256, heads=32, kv_heads=8),
}

# What ``--model`` may say for them, in lower case.
BUILT_IN_NAMES = {
    "7b": "Llama-2 7B",
    "13b": "Llama-2 13B",
    "70b": "Llama-2 70B",
    "8b": "Llama-3 8B",
    "meta-llama/llama-2-7b-hf": "Llama-2 7B",
    "meta-llama/llama-2-13b-hf": "Llama-2 13B",
    "meta-llama/llama-2-70b-hf": "Llama-2 70B",
    "meta-llama/meta-llama-3-8b": "Llama-3 8B",
    "meta-llama/llama-3.1-8b": "Llama-3 8B",
}


def read_shape(path: Path) -> LlamaShape:
    """The model of a Hugging Face ``config.json``.

    Raises:
        ConfigError: It is no such file, or describes a model that is not Llama-like.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the model configuration {path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, as in a Hugging Face config.json.")
    try:
        return shape_from_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def shape_from_config(config: Mapping[str, Any]) -> LlamaShape:
    """The model that a Hugging Face configuration describes.

    Raises:
        ConfigError: Its architecture is not supported, or a size is missing or no positive integer.
    """
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}.")

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{key}={value!r}: expected a positive integer.")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    has_attention_bias = model_type == "llama" and bool(config.get("attention_bias"))
    return LlamaShape(
        hidden=hidden,
        intermediate=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        vocab=size("vocab_size"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        tied=bool(config.get("tie_word_embeddings")),
        qkv_bias=has_attention_bias or model_type == "qwen2",
        out_bias=has_attention_bias,
        mlp_bias=model_type == "llama" and bool(config.get("mlp_bias")),
    )
