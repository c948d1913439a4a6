"""Runs of `launch/train.py` on ranks of their own, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from microadam_dist import MicroAdam

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
sys.path.insert(0, str(LAUNCH))  # as Python does for a script there; in the processes that import this, too
TINY_LLAMA = {
    **json.loads((ROOT / "configs" / "models" / "byte-llama-1m.json").read_text()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
}


def options(text: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Of a short run on a text that has model.json beside it."""
    return {
        "model_config": text.with_name("model.json"),
        "tokenizer": "bytes",
        "data": [str(text)],
        "seq_len": 64,
        "steps": 2,
        "output": output,
        **more,
    }


def options_with_checkpoints(text: Path, output: Path, **more: Any) -> dict[str, Any]:
    window = MicroAdam.paper_defaults()  # a window is more state to get wrong
    return options(text, output, **{"lr": 4e-3, **window, "steps": 12, "save_steps": 3, "logging_steps": 1, **more})


def train(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """What a rank does; for `run_ranks`."""
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    from train import train
    from training.options import Dtype, Exchange, Options

    if "shard_state" in options:
        options["shard_state"] = Exchange(options["shard_state"])
    dtype = "pure-bf16" if "pure_bf16" in str(options.get("deepspeed")) else options.pop("dtype", None)
    train(Options(**options, dtype=dtype and Dtype(dtype)))


def loaded_numel(folder: Path) -> int:
    """Elements of the saved weights, read as transformers reads them."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def assert_consistent(metrics: dict[str, Any]) -> None:
    """The bytes of all state are those of its paths together."""
    state, dense = metrics["state"], metrics["state"]["dense_params"]
    parts = state["sparse_bytes_per_param"] * (metrics["num_params"] - dense) + state["dense_bytes_per_param"] * dense
    assert math.isclose(parts, state["state_bytes"], rel_tol=1e-9)
    assert math.isclose(state["state_bytes_per_param"] * metrics["num_params"], state["state_bytes"], rel_tol=1e-9)


def assert_same_run(got: Path, expected: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (got, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [json.loads((folder / "metrics.json").read_text()) for folder in (got, expected)]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]
    assert losses[0]["heldout_after"] == losses[1]["heldout_after"]
