"""Layers that are frozen and thawed while a run goes on, or between a checkpoint and its resumption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import microadam_dist
from microadam_dist import CheckpointMismatchError, MicroAdam
from tests.deepspeed.cuts import cut_intervals, uncut_masks
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
STAGES = (0, 1, 2, 3)
SAVED_STAGES = (0, 2, 3)  # 1 and 2 write the same
FROZEN = ("up", "bias", "norm")  # two on the Top-K path and one on the dense path
GRADIENTS = make_gradients(6)
WITHOUT_FROZEN = [{name: g for name, g in grads.items() if name not in FROZEN} for grads in GRADIENTS]


def _engine(stage: int, *, frozen: bool = False, shift: float = 0.0) -> Any:
    """An engine around the model, whose weights may begin elsewhere."""
    model = make_model()
    with torch.no_grad():
        for param in model.parameters():
            param += shift
    _freeze(model, frozen)
    trained = [param for param in model.parameters() if param.requires_grad]
    return initialize(model, make_config(stage, torch.float32), model_parameters=trained)


def _freeze(model: Any, frozen: bool) -> None:
    for name in FROZEN:
        getattr(model, name).weight.requires_grad_(not frozen)


# In which of six steps the layers are frozen; the run is saved after three and goes on in another engine.
PATTERNS = {"at the start": (0, 1, 2), "at resume": (3, 4, 5), "every other step": (0, 2, 4)}  # as LISA does
SAVED_AT = 3


def _train(engine: Any, pattern: str, steps: range) -> None:
    for step in steps:
        frozen = step in PATTERNS[pattern]
        _freeze(engine.module, frozen)
        train(engine, [WITHOUT_FROZEN[step] if frozen else GRADIENTS[step]])


def _cuts(engine: Any) -> set[tuple[str, int, int]]:
    """The blocks that some rank has only in part."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, cut_intervals(base_optimizer(engine).sharded._layouts.values()))
    return {cut for cuts in gathered for cut in cuts}


def _begin(rank: int, world_size: int, folder: str) -> list[set[tuple[str, int, int]]]:
    cuts = []
    for stage in STAGES:
        for pattern in PATTERNS:
            engine = _engine(stage)
            _train(engine, pattern, range(SAVED_AT))
            engine.save_checkpoint(os.path.join(folder, f"{stage}-{pattern}"))
            cuts.append(_cuts(engine))
            engine.destroy()
    return cuts


def _go_on(rank: int, world_size: int, folder: str) -> list[tuple[dict[str, Tensor], set[tuple[str, int, int]]]]:
    results = []
    for stage in STAGES:
        for pattern in PATTERNS:
            engine = _engine(stage, shift=1.0)
            if world_size == 2:
                engine.load_checkpoint(os.path.join(folder, f"{stage}-{pattern}"))
            else:
                microadam_dist.deepspeed.load_checkpoint(engine, os.path.join(folder, f"{stage}-{pattern}"))
            _train(engine, pattern, range(SAVED_AT, len(GRADIENTS)))
            results.append((full_weights(engine), _cuts(engine)))
            engine.destroy()
    return results


def _in_one_process(stage: int, pattern: str) -> dict[str, Tensor]:
    """ZeRO steps a flat shard: what is frozen there has a gradient of zero, elsewhere it has none."""
    model = make_model()
    optimizer = MicroAdam(model.parameters(), **SETTINGS)
    for step, grads in enumerate(GRADIENTS):
        optimizer.zero_grad()
        model(grads).backward()
        for name in FROZEN if step in PATTERNS[pattern] else ():
            param = getattr(model, name).weight
            param.grad = torch.zeros_like(param) if stage else None
        optimizer.step()
    return {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[set[tuple[str, int, int]]]]:
    folder = tmp_path_factory.mktemp("begun-by-2-ranks")
    return folder, run_ranks(_begin, 2, str(folder))[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_frozen_thawed_and_resumed_as_in_one_process(
    world_size: int, begun: tuple[Path, list[set[tuple[str, int, int]]]]
) -> None:
    """On 2 ranks through DeepSpeed's own load, which resumes bit for bit; on others through ours."""
    folder, cuts_then = begun
    runs = [(stage, pattern) for stage in STAGES for pattern in PATTERNS]
    for results in run_ranks(_go_on, world_size, str(folder)):
        for (stage, pattern), then, (weights, cuts) in zip(runs, cuts_then, results, strict=True):
            expected = _in_one_process(stage, pattern)
            uncut = uncut_masks(weights, then | cuts)
            for name, weight in expected.items():
                mask = uncut[name]
                assert torch.equal(weights[name].flatten()[mask], weight.flatten()[mask]), (stage, pattern, name)


def _save(rank: int, world_size: int, folder: str) -> list[dict[str, Tensor]]:
    saved = []
    for stage in SAVED_STAGES:
        for frozen in (False, True):
            engine = _engine(stage, frozen=frozen)
            train(engine, (WITHOUT_FROZEN if frozen else GRADIENTS)[:3])
            engine.save_checkpoint(os.path.join(folder, f"{stage}-{frozen}"))
            saved.append(full_weights(engine))
            engine.destroy()
    return saved


def _load(rank: int, world_size: int, folder: str) -> list[list[dict[str, Tensor]]]:
    """Every checkpoint into a model in which other parameters are frozen: the weights, then and a step later."""
    results = []
    for stage in SAVED_STAGES:
        for was_frozen in (False, True):
            engine = _engine((stage + 1) % 4 if world_size == 1 else stage, frozen=not was_frozen, shift=1.0)
            microadam_dist.deepspeed.load_checkpoint(engine, os.path.join(folder, f"{stage}-{was_frozen}"))
            loaded = full_weights(engine)
            train(engine, (GRADIENTS if was_frozen else WITHOUT_FROZEN)[3:4])
            results.append([loaded, full_weights(engine)])
            engine.destroy()
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(_save, 2, str(folder))[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_weight_is_loaded_whatever_is_frozen(
    saved: tuple[Path, list[dict[str, Tensor]]], world_size: int
) -> None:
    folder, expected = saved
    for results in run_ranks(_load, world_size, str(folder)):
        for index, ((loaded, later), weights) in enumerate(zip(results, expected, strict=True)):
            for name, weight in weights.items():
                assert torch.equal(loaded[name], weight), (index, name)
                is_frozen_now = index % 2 == 0 and name in FROZEN
                assert torch.equal(later[name], weight) == is_frozen_now, (index, name)


def _load_another_model(rank: int, world_size: int, folder: str) -> None:
    for stage in (0, 2, 3):
        model = make_model()
        model.register_parameter("more", torch.nn.Parameter(torch.ones(3), requires_grad=False))
        engine = initialize(model, make_config(stage, torch.float32), model_parameters=list(model.parameters())[:-1])
        before = full_weights(engine)
        with pytest.raises(CheckpointMismatchError, match=r"1 tensors differ, such as 'more'.*not there"):
            microadam_dist.deepspeed.load_checkpoint(engine, os.path.join(folder, f"{stage}-False"))
        assert all(torch.equal(weight, before[name]) for name, weight in full_weights(engine).items())
        engine.destroy()


def test_a_tensor_left_over_is_refused_before_anything_changes(saved: tuple[Path, Any]) -> None:
    run_ranks(_load_another_model, 2, str(saved[0]))
