"""`launch/train.py` under the files of configs/accelerate, on CPU ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.launch import accelerate_cpu
from tests.launch.runs import ROOT
from tests.launch.runs import train as train_rank
from tests.ranks import run_ranks

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}


def _train_under(rank: int, world_size: int, config: Path, run: dict[str, Any]) -> None:
    os.chdir(ROOT)  # paths in the files are relative to it
    environment = accelerate_cpu.environment(config, world_size)
    environment.pop("ACCELERATE_USE_CPU", None)
    json_path = environment.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE", None)
    if environment.pop("ACCELERATE_USE_DEEPSPEED", None):
        run = {**run, "deepspeed": ROOT / json_path}
    os.environ.update(environment)
    accelerate_cpu.enable_fsdp()
    train_rank(rank, world_size, run)


def train_under(config: str, run: dict[str, Any], num_ranks: int = 2) -> dict[str, Any]:
    run_ranks(_train_under, 1 if config == "single_gpu" else num_ranks, CONFIGS[config], run)
    metrics: dict[str, Any] = json.loads((run["output"] / "metrics.json").read_text())
    return metrics
