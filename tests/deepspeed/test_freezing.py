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


def _switch(rank: int, world_size: int) -> list[tuple[dict[str, Tensor], list[Any]]]:
    """Frozen in the first step and the fourth, as LISA and gradual unfreezing do."""
    results = []
    for stage in STAGES:
        engine = _engine(stage)
        for step, (grads, without) in enumerate(zip(GRADIENTS, WITHOUT_FROZEN, strict=True)):
            _freeze(engine.module, step in (0, 3))
            train(engine, [without if step in (0, 3) else grads])
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, cut_intervals(base_optimizer(engine).sharded._layouts.values()))
        results.append((full_weights(engine), [cut for cuts in gathered for cut in cuts]))
        engine.destroy()
    return results


def _switched_in_one_process(stage: int) -> dict[str, Tensor]:
    """ZeRO steps a flat shard: what is frozen there has a gradient of zero, elsewhere it has none."""
    model = make_model()
    optimizer = MicroAdam(model.parameters(), **SETTINGS)
    for step, grads in enumerate(GRADIENTS):
        optimizer.zero_grad()
        model(grads).backward()
        for name in FROZEN if step in (0, 3) else ():
            param = getattr(model, name).weight
            param.grad = torch.zeros_like(param) if stage else None
        optimizer.step()
    return {name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def switched() -> list[list[tuple[dict[str, Tensor], list[Any]]]]:
    return run_ranks(_switch, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_frozen_in_the_first_step_trains_later(
    stage: int, switched: list[list[tuple[dict[str, Tensor], list[Any]]]]
) -> None:
    expected = _switched_in_one_process(stage)
    for weights, cuts in (results[stage] for results in switched):
        uncut = uncut_masks(weights, cuts)
        for name, weight in expected.items():
            mask = uncut[name]
            assert torch.equal(weights[name].flatten()[mask], weight.flatten()[mask]), name


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
