"""What wraps a model is no part of its parameters' names: wrapped models load each other's state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from microadam_dist import CheckpointMismatchError, MicroAdam, load_sharded, save_sharded
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from microadam_dist.checkpoint.training import SavedTraining
from microadam_dist.optimizer.training import load_training
from tests.checkpoint.blocks import blocks, dense
from tests.ranks import run_ranks

from .models import SETTINGS, Given, GivenGradients, assert_same, backward, make_model, message_of, shard, wrap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:FSDP")

NUM_STEPS = 3
Blocks = dict[tuple[str, int, int], dict[str, Tensor]]


class Holder(nn.Module):
    """A model in a model that has DDP's name for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, grads: dict[str, Tensor]) -> Any:
        return self.module(grads)


def _checkpointed() -> nn.Module:
    model = make_model()
    for name, child in list(model.named_children()):
        setattr(model, name, checkpoint_wrapper(child))
    return model


WRAPPED = {
    "plain": make_model,
    "DDP": lambda: DistributedDataParallel(make_model()),
    "compiled": lambda: torch.compile(make_model(), backend="eager"),
    "DDP of compiled": lambda: DistributedDataParallel(torch.compile(make_model(), backend="eager")),
    "compiled DDP": lambda: torch.compile(DistributedDataParallel(make_model()), backend="eager"),
    "activation checkpoints": _checkpointed,
    "FSDP1": lambda: wrap(make_model()),
    "FSDP1 of activation checkpoints": lambda: wrap(_checkpointed()),
    "FSDP2": lambda: shard(make_model()),
}


def _optimizer(model: nn.Module) -> MicroAdam:
    return MicroAdam(model.named_parameters(), **SETTINGS)


def _state(optimizer: MicroAdam) -> tuple[Blocks, dict[tuple[str, str, int], float]]:
    """This rank's blocks and moments."""
    shards = [
        SourceShard(layout, optimizer.sharded.flat_state(p), torch.empty(0), "")
        for p, layout in optimizer.sharded.layouts().items()
        if optimizer.state.get(p)
    ]
    found = {key: {n: t.clone() for n, t in block.items() if n != "weights"} for key, block in blocks(shards).items()}
    return found, dense(shards)


def _assert_same_state(optimizer: MicroAdam, plain: MicroAdam, *, cut: bool) -> None:
    """All moments, and all blocks unless rows were cut: then most of them."""
    (got, moments), (expected, expected_moments) = _state(optimizer), _state(plain)
    assert moments.items() <= expected_moments.items()
    equal = {key for key in got.keys() & expected.keys() if _same(got[key], expected[key])}
    assert sum(numel for _, _, numel in equal) >= (0.8 if cut else 1.0) * sum(numel for _, _, numel in got)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def _train(model: nn.Module, optimizer: MicroAdam) -> None:
    for step in range(NUM_STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def _plain() -> MicroAdam:
    model = make_model()
    optimizer = _optimizer(model)
    _train(model, optimizer)
    return optimizer


def _load_each_other(rank: int, world_size: int, folder: Path) -> None:
    plain = _plain()
    for kind, make in WRAPPED.items():
        model = make()
        optimizer = _optimizer(model)
        _train(model, optimizer)
        _assert_same_state(optimizer, plain, cut="FSDP1" in kind)
        save_sharded(optimizer, folder / kind)
    for kind, make in WRAPPED.items():
        model = make()
        for source in WRAPPED:
            optimizer = _optimizer(model)
            load_sharded(optimizer, folder / source)
            _assert_same_state(optimizer, plain, cut="FSDP1" in kind + source)
        _load_from_one_process(model, plain, kind)


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in state.items()}


def _load_from_one_process(model: nn.Module, plain: MicroAdam, kind: str) -> None:
    """Weights and state, as a training of one process has saved them."""
    layouts = plain.sharded.layouts()
    sources = [
        SourceShard(layout, _on_cpu(plain.sharded.flat_state(p)), p.detach().cpu().flatten(), "")
        for p, layout in layouts.items()
    ]
    resharder = Resharder(sources)
    saved = SavedTraining(Path("one"), "one process", resharder, resharder.states, plain.param_groups, None)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = _optimizer(model)
    load_training(model, optimizer, lambda share: saved)
    _assert_same_state(optimizer, plain, cut="FSDP1" in kind)
    for p, layout in optimizer.sharded.layouts().items():
        (span,) = layout.spans
        expected = resharder.whole(span.fqn).flatten()[span.start : span.start + span.numel]
        assert torch.equal(optimizer.sharded.shard(p).param.detach().cpu().flatten(), expected), (kind, span)


def test_wrapped_models_load_each_others_sharded_files(tmp_path: Path) -> None:
    run_ranks(_load_each_other, 2, tmp_path)


def _load_each_others_dcp(rank: int, world_size: int, folder: Path) -> None:
    plain = _plain()
    with_dcp = [kind for kind in WRAPPED if "FSDP1" not in kind]  # torch's state dict has no place for the state there
    for kind in with_dcp:
        model = WRAPPED[kind]()
        optimizer = _optimizer(model)
        _train(model, optimizer)
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=folder / kind)
    for kind in with_dcp:
        for source in with_dcp:
            model = WRAPPED[kind]()
            optimizer = _optimizer(model)
            saved = get_optimizer_state_dict(model, optimizer)
            dcp.load(saved, checkpoint_id=folder / source)
            set_optimizer_state_dict(model, optimizer, saved)
            _assert_same_state(optimizer, plain, cut=False)


def test_wrapped_models_load_each_others_dcp_files(tmp_path: Path) -> None:
    run_ranks(_load_each_others_dcp, 2, tmp_path)


def test_a_module_of_that_name_keeps_it() -> None:
    """`module.` is DDP's only at the front, and only once."""
    names = [named.fqn for named in _optimizer(Holder(Holder(make_model()))).names.groups[0]]
    assert names[0] == "module.embed.weight"


# ---------------------------------------------------------------- without names


def _unnamed(shapes: dict[str, tuple[int, ...]]) -> MicroAdam:
    model = GivenGradients(shapes)
    optimizer = MicroAdam(model.parameters(), **SETTINGS)
    model({name: torch.ones(shape) for name, shape in shapes.items()}).backward()
    optimizer.step()
    return optimizer


SHAPES = {"first": (80, 64), "second": (80, 64), "third": (7,)}


def test_positions_need_equal_counts_and_shapes(tmp_path: Path) -> None:
    saved = _unnamed(SHAPES)
    save_sharded(saved, tmp_path / "positions")
    named = MicroAdam(GivenGradients(SHAPES).named_parameters(), **SETTINGS)
    load_sharded(named, tmp_path / "positions")  # by position
    for a, b in zip(saved.state.values(), named.state.values(), strict=True):
        assert_same(a, b)
    save_sharded(named, tmp_path / "named")
    unnamed = MicroAdam(GivenGradients(SHAPES).parameters(), **SETTINGS)
    message = message_of(CheckpointMismatchError, lambda: load_sharded(unnamed, tmp_path / "named"))
    assert "model.named_parameters()" in message and not unnamed.state

    others = [{**SHAPES, "fourth": (3,)}, dict(list(SHAPES.items())[:2]), {**SHAPES, "second": (64, 80)}]
    for shapes in others:
        optimizer = _unnamed(shapes)
        before = {name: tensor.clone() for state in optimizer.state.values() for name, tensor in state.items()}
        message = message_of(CheckpointMismatchError, lambda o=optimizer: load_sharded(o, tmp_path / "positions"))
        assert "by position" in message and "model.named_parameters()" in message
        after = {name: tensor for state in optimizer.state.values() for name, tensor in state.items()}
        assert_same(after, before)


def test_names_that_are_numbers_are_positions_only_in_order(tmp_path: Path) -> None:
    """A Sequential of two layers has "0.weight"; a list of parameters in order has nothing but positions."""
    model = nn.Sequential(Given(80, 64), Given(64, 80))
    optimizer = MicroAdam(model.named_parameters(), **SETTINGS)
    model[0](torch.ones(80, 64)).backward()
    optimizer.step()
    save_sharded(optimizer, tmp_path / "names")
    swapped = MicroAdam(list(model.named_parameters())[::-1], **SETTINGS)
    load_sharded(swapped, tmp_path / "names")  # by name, and one was never stepped
    assert swapped.state.keys() == {model[0].weight}
