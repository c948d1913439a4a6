"""`launch/train.py` under every file of configs/accelerate, and Accelerate's own checkpoints.

CPU ranks; see `accelerate_cpu` for what is put in the place of Accelerate's launcher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from microadam_dist import CheckpointMismatchError, MicroAdam
from microadam_dist.integrations.sharded import keep_sharded_state
from tests.launch import accelerate_cpu
from tests.launch.accelerate_engines import CONFIGS, train_under
from tests.launch.runs import ROOT, assert_consistent, assert_same_run, loaded_numel
from tests.launch.runs import options_with_checkpoints as options
from tests.launch.runs import train as train_rank
from tests.ranks import RankError, run_ranks
from tests.text import batch, tiny_llama

pytestmark = pytest.mark.deepspeed
ENGINES = {
    "ddp": "DDP",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero3": "ZeRO-3",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "single_gpu": "one process",
}


def test_every_config_is_run() -> None:
    assert CONFIGS.keys() == ENGINES.keys()


@pytest.mark.parametrize(
    ("config", "shard_state"),
    [("single_gpu", None), ("ddp", "touched"), ("ddp", "newest"), ("fsdp1", None), ("fsdp2", None)],
)
def test_trains_and_resumes_exactly(config: str, shard_state: str | None, text: Path, tmp_path: Path) -> None:
    more = {"shard_state": shard_state} if shard_state else {}
    metrics = train_under(config, options(text, tmp_path / "straight", **more))
    assert metrics["engine"] == ENGINES[config]
    assert metrics["optimizer"] == "MicroAdam"
    assert loaded_numel(tmp_path / "straight") == metrics["num_params"]
    assert_consistent(metrics)
    checkpoint = str(tmp_path / "straight" / "checkpoint-6")
    train_under(config, options(text, tmp_path / "resumed", resume=checkpoint, **more))
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_gradients_are_released_under_fsdp2(text: Path, tmp_path: Path) -> None:
    """The weights of a model folder reach all ranks, and the recipe for 8 GPUs has the bits of the normal step."""
    train_under("single_gpu", options(text, tmp_path / "model", dtype="pure-bf16", steps=1, save_steps=None))
    recipe = yaml.safe_load((ROOT / "configs" / "single_gpu" / "70b_8x40gb.yaml").read_text())
    assert recipe.pop("gradient_release")
    recipe |= {"model_config": None, "model": str(tmp_path / "model"), "seq_len": 64, "steps": 4, "metrics_every": 2}
    released = {"gradient_release": True, "save_steps": 2}
    resumed = {"gradient_release": True, "save_steps": None, "resume": str(tmp_path / "released" / "checkpoint-2")}
    for folder, how in (("released", released), ("resumed", resumed), ("normal", {"clip": 0.0, "save_steps": None})):
        assert train_under("fsdp2", options(text, tmp_path / folder, **recipe, **how))["engine"] == "FSDP2"
    for folder in ("released", "resumed"):
        assert_same_run(tmp_path / folder, tmp_path / "normal")


def test_engines_reach_the_same_loss(text: Path, tmp_path: Path) -> None:
    """The same data and seed on two ranks; bf16, fp32 weights or an fp32 copy of them.

    So few steps that chaos has hardly begun: weights changed by 1e-4 of themselves at the start move the loss by 0.0006
    (standard deviation of 8; 0.0028 after 60 steps). A learning rate 10 % higher moves it by 0.074.
    """
    losses = {}
    for config in ("ddp", "fsdp1", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"):
        run = options(text, tmp_path / config, steps=30, save_steps=None)
        metrics = train_under(config, run)
        assert (metrics["engine"], metrics["world_size"]) == (ENGINES[config], 2)
        losses[config] = metrics["heldout_after"]
        assert losses[config] < metrics["heldout_before"] - 0.5
    print("held-out nats per token:", {config: round(loss, 4) for config, loss in losses.items()})
    del losses["deepspeed_zero3"]  # cuts blocks of every matrix
    assert max(losses.values()) - min(losses.values()) < 0.01


def test_fsdp_without_gpus_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="FSDP on GPUs only"):
        run_ranks(_train_with, 2, {"ACCELERATE_USE_FSDP": "true"}, options(text, tmp_path))
    with pytest.raises(RankError, match="does not start ranks for DeepSpeed without GPUs"):
        run_ranks(_train_with, 2, {"ACCELERATE_USE_DEEPSPEED": "true"}, options(text, tmp_path))


def _train_with(rank: int, world_size: int, environment: dict[str, str], run: dict[str, Any]) -> None:
    os.environ.update(environment)
    train_rank(rank, world_size, run)


def _launch(config: str, num_processes: int, text: Path, output: Path, *more: str) -> dict[str, Any]:
    """The command itself; returns what it has left in metrics.json."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[config])]
    command += ["--num_processes", str(num_processes), str(ROOT / "launch" / "train.py")]
    command += ["--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes", "--data", str(text)]
    command += ["--seq-len", "64", "--steps", "2", "--output", str(output / "run"), *more]
    environment = {**os.environ, "TMPDIR": str(output)}  # torchrun leaves folders for logs behind
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    metrics: dict[str, Any] = json.loads((output / "run" / "metrics.json").read_text())
    return metrics


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="a second rank has no GPU")
def test_accelerate_launch(text: Path, tmp_path: Path) -> None:
    """With DDP, which needs no GPU."""
    metrics = _launch("ddp", 2, text, tmp_path, "--shard-state", "touched")
    assert (metrics["engine"], metrics["world_size"]) == (ENGINES["ddp"], 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("config", ENGINES)
def test_accelerate_launch_on_a_gpu(config: str, text: Path, tmp_path: Path) -> None:
    """Every file, with one rank, which goes on from a checkpoint."""
    for more in ("--save-steps", "1"), ("--resume", str(tmp_path / "run" / "checkpoint-1")):
        metrics = _launch(config, 1, text, tmp_path, *more)
        assert (metrics["engine"], metrics["world_size"]) == (ENGINES["single_gpu" if config == "ddp" else config], 1)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("config", [config for config in ENGINES if config not in ("ddp", "single_gpu")])
def test_accelerate_launch_on_two_gpus(config: str, text: Path, tmp_path: Path) -> None:
    metrics = _launch(config, 2, text, tmp_path)
    assert (metrics["engine"], metrics["world_size"]) == (ENGINES[config], 2)


# ---------------------------------------------------------------- accelerator.save_state, load_state


@pytest.mark.parametrize("config", ["ddp", "fsdp1", "fsdp2", "single_gpu"])
def test_save_state_and_load_state(config: str, tmp_path: Path) -> None:
    run_ranks(_save_and_load, 1 if config == "single_gpu" else 2, CONFIGS[config], tmp_path)


def _save_and_load(rank: int, world_size: int, config: Path, folder: Path) -> None:
    os.environ.update(accelerate_cpu.environment(config, world_size) | {"ACCELERATE_USE_CPU": "true"})
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    accelerate_cpu.enable_fsdp()
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    options = {"shard_state": True} if config.stem == "ddp" else {}

    def prepared() -> tuple[Any, Any]:
        model = tiny_llama()
        optimizer = MicroAdam(model.named_parameters(), lr=4e-3, window_size=2, density=0.05, **options)
        return accelerator.prepare(model, optimizer)

    def train(model: Any, optimizer: Any, steps: range) -> list[Tensor]:
        for step in steps:
            mine = batch(step)[accelerator.process_index :: accelerator.num_processes]
            accelerator.backward(model(input_ids=mine, labels=mine).loss)
            optimizer.step()
            optimizer.zero_grad()
        return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]

    model, optimizer = prepared()
    keep_sharded_state(accelerator)
    train(model, optimizer, range(4))
    accelerator.save_state(str(folder))
    expected = train(model, optimizer, range(4, 8))
    accelerator.load_state(str(folder))
    assert all(torch.equal(*pair) for pair in zip(train(model, optimizer, range(4, 8)), expected, strict=True))

    # What was saved without the state raises, also in a program that does not know of it.
    if optimizer.optimizer.is_saved_apart:
        if accelerator.is_main_process:
            (folder / "microadam_state_0").rename(folder / "elsewhere")
        accelerator.wait_for_everyone()
        with pytest.raises(CheckpointMismatchError, match="keep_sharded_state"):
            accelerator.load_state(str(folder))
        accelerator.free_memory()
        _, optimizer = prepared()
        states = torch.load(folder / "optimizer.bin") if config.stem == "ddp" else {}
        if states and accelerator.process_index == 1:
            with pytest.raises(CheckpointMismatchError, match="microadam_dist.load_sharded"):
                optimizer.load_state_dict(states)


def _sharded_state(rank: int, world_size: int, folder: Path, saved_by: int, shard_state: bool) -> dict[str, Tensor]:
    """Save, or load on any number of ranks: whole weights and state."""
    os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE=str(world_size))
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    optimizer = MicroAdam(model.named_parameters(), lr=4e-3, window_size=2, density=0.05, shard_state=shard_state)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    keep_sharded_state(accelerator)
    if saved_by == world_size and shard_state and not folder.exists():
        for step in range(3):
            accelerator.backward(wrapped(input_ids=batch(step), labels=batch(step)).loss)
            prepared.step()
            prepared.zero_grad()
        accelerator.save_state(str(folder))
    else:
        accelerator.load_state(str(folder))
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, tensor in optimizer.state[p].items():
            found[f"{name}.{key}"] = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
    return found


def test_shared_state_loads_on_any_ranks_and_where_none_is_shared(tmp_path: Path) -> None:
    """Accelerate keeps the part of one rank; the whole lies beside it."""
    expected = run_ranks(_sharded_state, 2, tmp_path / "saved", 2, True)[0]
    for world_size, shard_state in ((1, True), (1, False), (2, False), (3, True)):
        for found in run_ranks(_sharded_state, world_size, tmp_path / "saved", 2, shard_state):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), (world_size, shard_state)
