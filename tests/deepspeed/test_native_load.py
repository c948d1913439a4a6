"""`engine.load_checkpoint` of what does not fit: an error on every rank, before DeepSpeed writes the first weight."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import microadam_dist
from microadam_dist import CheckpointMismatchError
from tests.deepspeed.engines import (
    SETTINGS,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
STAGES = (0, 2, 3)
BF16 = torch.bfloat16
GRADIENTS = make_gradients(4, BF16)
FROZEN = ("up", "norm")


def _engine(stage: int, *, other: str = "") -> Any:
    """An engine like the one that saved, but for what ``other`` says."""
    model = make_model(BF16)
    params = {**SETTINGS, "density": 0.1} if other == "settings" else SETTINGS
    if other == "model":
        model.down = type(model.down)(96, 100)
    elif other == "frozen":
        for name in FROZEN:
            getattr(model, name).weight.requires_grad_(False)
    config = make_config(stage, BF16, params)
    if other == "optimizer":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    return initialize(model, config, model_parameters=[p for p in model.parameters() if p.requires_grad])


def _save(rank: int, world_size: int, folder: str) -> None:
    for stage in STAGES:
        for other in ("", "optimizer"):
            engine = _engine(stage, other=other)
            train(engine, GRADIENTS[:2])
            engine.save_checkpoint(f"{folder}/{stage}{other}")
            engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-2-ranks")
    run_ranks(_save, 2, str(folder))
    return folder


def _snapshot(engine: Any) -> list[Tensor]:
    """Weights, and state as it lies in the optimizer."""
    state = [dict(state) for state in base_optimizer(engine).state.values()]
    tensors = [tensor.clone() for tensors in state for tensor in tensors.values()]
    return [*full_weights(engine).values(), *tensors]


def _fail_to_load(rank: int, world_size: int, attempts: list[tuple[str, int, str]]) -> list[str]:
    messages = []
    for folder, stage, other in attempts:
        engine = _engine(stage, other=other)
        if other not in ("model", "frozen"):
            train(engine, GRADIENTS[2:])
        before = _snapshot(engine)
        with pytest.raises(CheckpointMismatchError) as error:
            engine.load_checkpoint(folder)
        after = _snapshot(engine)
        assert len(before) == len(after)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), (folder, other)
        messages.append(str(error.value))
        engine.destroy()
    return messages


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated state": ("*rank_1*optim_states.pt", lambda p: p.write_bytes(p.read_bytes()[:-900]), "truncated"),
    "missing state": ("*rank_1*optim_states.pt", Path.unlink, "written by 2 ranks and has 1 files"),
    "a flipped bit in the state": ("*rank_1*optim_states.pt", _flip_a_bit, "checksum of"),
    "a flipped bit in the module": ("*model_states.pt", _flip_a_bit, "checksum of"),
    "truncated module": ("*model_states.pt", lambda p: p.write_bytes(p.read_bytes()[:-900]), "truncated"),
}


@pytest.mark.parametrize("world_size", [2, 1])
def test_what_does_not_fit_is_refused_before_anything_changes(saved: Path, tmp_path: Path, world_size: int) -> None:
    expected, attempts = [], []
    for stage in STAGES:
        whole = str(saved / str(stage))
        if world_size == 1:
            if stage:
                attempts.append((whole, stage, ""))
                expected.append("written by 2 ranks under ZeRO stage ., and this is stage . on 1. Load it with micro")
            continue
        attempts += [(whole, stage, other) for other in ("settings", "model", "frozen")]
        remedy = "construct the optimizer with density=0.05"
        expected += [remedy, r"'down.weight'.*belongs to another model", "another shard|param groups of|tensors differ"]
        attempts += [(whole, 2 if stage == 3 else 3, ""), (f"{whole}optimizer", stage, "")]
        expected += [r"microadam_dist.deepspeed.load_checkpoint\(engine, ", "."]
        for damage, (pattern, do, message) in DAMAGES.items():
            folder = tmp_path / f"{stage}-{damage}"
            shutil.copytree(saved / str(stage), folder)
            for path in sorted(folder.glob(f"*/{pattern}"))[-1:]:
                do(path)
                attempts.append((str(folder), stage, ""))
                expected.append(message)
    for messages in run_ranks(_fail_to_load, world_size, attempts):
        for attempt, message, pattern in zip(attempts, messages, expected, strict=True):
            assert re.search(pattern, message), (attempt, message)


def _save_adapter(rank: int, world_size: int, folder: str) -> list[dict[str, Tensor]]:
    weights = []
    for stage in STAGES:
        engine = _engine(stage, other="frozen")
        train(engine, [{name: g for name, g in grads.items() if name not in FROZEN} for grads in GRADIENTS[:2]])
        engine.save_checkpoint(f"{folder}/{stage}", exclude_frozen_parameters=True)
        weights.append(full_weights(engine))
        engine.destroy()
    return weights


def _load_adapter(rank: int, world_size: int, folder: str) -> list[dict[str, Tensor]]:
    weights = []
    for stage in STAGES:
        target = stage if world_size == 2 else (stage + 1) % 4
        engine = _engine(target, other="frozen")
        if world_size == 2:  # as Trainer does for adapters
            engine.load_checkpoint(f"{folder}/{stage}", load_module_strict=False)
            weights.append(full_weights(engine))
            engine.destroy()
            engine = _engine(target, other="frozen")
        microadam_dist.deepspeed.load_checkpoint(engine, f"{folder}/{stage}")
        weights.append(full_weights(engine))
        engine.destroy()
        everything_trained = _engine(target)
        with pytest.raises(CheckpointMismatchError, match="2 tensors differ, such as '(up|norm).weight'"):
            microadam_dist.deepspeed.load_checkpoint(everything_trained, f"{folder}/{stage}")
        everything_trained.destroy()
    return weights


def test_a_checkpoint_without_frozen_parameters_changes_ranks_and_stage(tmp_path: Path) -> None:
    """As Trainer saves a model with adapters."""
    saved = run_ranks(_save_adapter, 2, str(tmp_path))[0]
    for world_size in (2, 1, 3):
        times = 2 if world_size == 2 else 1
        for loaded in run_ranks(_load_adapter, world_size, str(tmp_path)):
            expected = [weights for weights in saved for _ in range(times)]
            for got, weights in zip(loaded, expected, strict=True):
                assert all(torch.equal(got[name], weight) for name, weight in weights.items())
