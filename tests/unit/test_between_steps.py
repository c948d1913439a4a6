"""What a step builds anew, and what it notices that was changed since the last one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from microadam_dist import ConfigError, MicroAdam
from microadam_dist.arithmetic.scalars import StepScalars
from microadam_dist.backends import cpu
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError
from microadam_dist.layout import StateLayout
from microadam_dist.optimizer.checked import CheckedState

from .training import SHAPES, gradient, make_params, microadam, params_of, snapshot

try:
    HAS_KERNEL = bool(cpu.available_isas())
except BackendUnavailableError:
    HAS_KERNEL = False


def step(optimizer: MicroAdam, seed: int, in_backward: bool = False) -> None:
    indices = {p: i for i, p in enumerate(params_of(optimizer))}
    for p, i in indices.items():
        p.grad = gradient(p, seed, i)
    if not in_backward:
        optimizer.step()
        return
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            optimizer.step_in_backward(p, index)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many objects of each class have been built."""
    counts: Counter[str] = Counter()
    cpu._scalars.cache_clear()  # of the test before
    for built_class in (MicroAdamConfig, StateLayout, CheckedState, StepScalars, cpu._Layout):

        def count(
            self: object, *args: object, _init: Callable[..., None] = built_class.__init__, **kwargs: object
        ) -> None:
            counts[type(self).__name__] += 1
            _init(self, *args, **kwargs)

        monkeypatch.setattr(built_class, "__init__", count)
    return counts


@pytest.mark.skipif(not HAS_KERNEL, reason="the CPU kernel is not installed")
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_builds_its_scalars_and_nothing_else(in_backward: bool, built: Counter[str]) -> None:
    optimizer = microadam(make_params(SHAPES), backend="cpu")
    step(optimizer, 0, in_backward)
    assert built.keys() == {"MicroAdamConfig", "StateLayout", "CheckedState", "StepScalars", "_Layout"}
    for seed in (1, 2):
        built.clear()
        step(optimizer, seed, in_backward)
        assert built == {"StepScalars": 1}
    optimizer.param_groups[0]["lr"] /= 2
    built.clear()
    step(optimizer, 3, in_backward)
    assert built == {"StepScalars": 1, "MicroAdamConfig": 1}


# ---------------------------------------------------------------- changes by the user


def _data(optimizer: MicroAdam) -> None:
    for p in params_of(optimizer):
        p.data = p.data.clone() * 0.5


def _state_data(optimizer: MicroAdam) -> None:
    """As engines do that move state away and back."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.data = tensor.data.clone()
    if (exp_avg := optimizer.state[params_of(optimizer)[-1]].get("exp_avg")) is not None:
        exp_avg.data = exp_avg.data + 1


def _state(optimizer: MicroAdam) -> None:
    other = microadam(make_params(SHAPES), window_size=2)
    step(other, 100)
    optimizer.load_state_dict(other.state_dict())


def _cleared(optimizer: MicroAdam) -> None:
    optimizer.state.clear()


def _counter(optimizer: MicroAdam) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(50)


def _group(optimizer: MicroAdam) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(64, 256))], "lr": 0.5})


def _setting(name: str, value: object) -> Callable[[MicroAdam], None]:
    def change(optimizer: MicroAdam) -> None:
        optimizer.param_groups[0][name] = value

    return change


CHANGES = {
    "lr": _setting("lr", 0.25),
    "lr, a tensor": _setting("lr", torch.tensor(0.25)),
    "betas": _setting("betas", [0.5, 0.6]),
    "weight_decay": _setting("weight_decay", 0.5),
    "eps": _setting("eps", 0.5),
    "correction": _setting("correction", "window"),
    "data": _data,
    "data of state": _state_data,
    "state": _state,
    "state cleared": _cleared,
    "counter": _counter,
    "group": _group,
}


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str, in_backward: bool) -> None:
    """The same as with copies of the optimizer, which know nothing of earlier steps."""
    runs = {}
    for kind in ("kept", "copied", "unchanged"):
        optimizer = microadam(make_params(SHAPES), window_size=2)
        for seed in range(5):
            if seed == 3 and kind != "unchanged":
                CHANGES[change](optimizer)
            if kind == "copied":
                optimizer = copy.deepcopy(optimizer)
            step(optimizer, seed, in_backward)
        runs[kind] = snapshot(optimizer)
    assert runs["kept"] == runs["copied"] != runs["unchanged"]


def test_settings_that_change_in_place_are_read_at_every_step() -> None:
    lr, betas = torch.tensor(0.1), [0.9, 0.99]
    changed, twin = microadam(make_params(SHAPES)), microadam(make_params(SHAPES))
    changed.param_groups[0].update(lr=lr, betas=betas)
    for seed in range(4):
        lr.fill_(0.1 / (seed + 1))
        betas[0] = 0.9 / (seed + 1)
        twin.param_groups[0].update(lr=float(lr), betas=(betas[0], 0.99))
        step(changed, seed)
        step(twin, seed)
    assert snapshot(changed) == snapshot(twin)


@pytest.mark.parametrize(
    ("name", "value"),
    [("window_size", True), ("lr", -1.0), ("betas", (0.9, True)), ("amsgrad", True), ("density", 0.5), ("eps", 0)],
)
def test_settings_that_become_invalid_raise_and_change_nothing(name: str, value: object) -> None:
    optimizer, twin = microadam(make_params(SHAPES)), microadam(make_params(SHAPES))
    step(optimizer, 0)
    step(twin, 0)
    group = optimizer.param_groups[0]
    before = dict(group)
    for _ in range(2):
        group[name] = value
        with pytest.raises(ConfigError, match=name):
            optimizer.step()
    group.clear()
    group.update(before)
    step(optimizer, 1)
    step(twin, 1)
    assert snapshot(optimizer) == snapshot(twin)
