"""Shapes, against the models that transformers builds from the same configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from microadam_dist import ConfigError
from microadam_dist.planner.shapes import LLAMAS, numel, read_shape, shape_from_config

SIZES = {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_attention_heads": 4},
    "llama, grouped queries, wide heads": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "llama, all biases, tied": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "qwen2, tied": {
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = SIZES | CONFIGS[name]
    config = AutoConfig.for_model(**fields)
    config.to_json_file(tmp_path / "config.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert read_shape(tmp_path / "config.json").parameters() == expected


def test_built_in_models_have_their_published_sizes() -> None:
    """Numbers of parameters as stated on the models' pages."""
    published = {"Llama-2 7B": 6_738_415_616, "Llama-2 13B": 13_015_864_320, "Llama-2 70B": 68_976_648_192}
    published["Llama-3 8B"] = 8_030_261_248
    assert {name: numel(shape.parameters()) for name, shape in LLAMAS.items()} == published


def test_configuration_of_this_repository() -> None:
    shape = read_shape(Path(__file__).parents[2] / "configs" / "models" / "byte-llama-1m.json")
    assert (shape.hidden, shape.head_dim, shape.num_layers) == (128, 64, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"model_type": "gpt2"}',
            r"config.json: model_type 'gpt2' is not supported; supported: llama, mistral, qwen2",
        ),
        ("{}", "model_type None is not supported"),
        (json.dumps({**SIZES, "model_type": "llama"}), "num_attention_heads=None: expected a positive integer"),
        (json.dumps({**SIZES, **CONFIGS["llama"], "vocab_size": "many"}), "vocab_size='many'"),
        ("[1]", "expected a JSON object"),
        ("{", "cannot read the model configuration"),
    ],
)
def test_errors(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_shape(tmp_path / "config.json")


def test_heads_default_to_those_of_the_queries() -> None:
    assert shape_from_config({**SIZES, **CONFIGS["llama"]}).num_kv_heads == 4
