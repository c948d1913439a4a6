"""State that others put into ``optimizer.state`` or a state dict: it fits and is used, or it is refused by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from microadam_dist import CheckpointMismatchError, ConfigError, MicroAdam
from microadam_dist.config import LATER_SETTINGS
from tests.ranks import run_ranks
from tests.unit.training import bits, make_params, microadam, params_of, snapshot, steps_of, train

SHAPES = [(40, 136), (40,), (16, 32, 3, 3)]  # the second takes the dense path


def trained(num_steps: int = 3, **settings: Any) -> MicroAdam:
    optimizer = microadam(make_params(SHAPES), **settings)
    train(optimizer, range(num_steps))
    return optimizer


def state_of(optimizer: Optimizer, index: int) -> dict[str, Any]:
    return optimizer.state[params_of(optimizer)[index]]


# ---------------------------------------------------------------- refused in step()

Edit = Callable[[Tensor], Any]
REFUSED: dict[str, tuple[int, str, Edit]] = {  # parameter, name, what is put in the place of the tensor
    "short": (0, "codes", lambda old: old[:1].clone()),
    "short moments": (1, "exp_avg", lambda old: old[:-1].clone()),
    "cast": (0, "bucket_lo", lambda old: old.half()),
    "moments were cast": (1, "exp_avg_sq", lambda old: old.bfloat16()),
    "other shape": (0, "codes", lambda old: old.view(-1)),
    "not contiguous": (0, "bucket_hi", lambda old: old.repeat_interleave(2, dim=1)[:, ::2]),
    "on another device": (2, "values", lambda old: old.to("meta")),
    "no tensor": (2, "values", lambda old: old.tolist()),
    "outside its block": (2, "indices", lambda old: torch.full_like(old, 255)),
    "half a step": (2, "step", lambda old: old + 0.5),
    "negative": (2, "step", lambda old: -old),
    "junk": (0, "step", lambda old: "three"),
    "rounded": (0, "step", lambda old: torch.tensor(2.0**24)),
}


def without_memory(old: Tensor) -> Tensor:
    empty = old.clone()
    empty.untyped_storage().resize_(0)
    return empty


REFUSED["freed"] = (0, "codes", without_memory)


@pytest.mark.parametrize("kind", REFUSED)
def test_state_that_does_not_fit_is_refused_by_name_and_nothing_is_written(kind: str) -> None:
    index, name, edit = REFUSED[kind]
    optimizer = trained()
    old, weights = state_of(optimizer, index)[name], [bits(p) for p in params_of(optimizer)]
    state_of(optimizer, index)[name] = edit(old)
    with pytest.raises(CheckpointMismatchError, match=rf"'{name}' of parameter {index} of shape|'{name}'.* outside"):
        train(optimizer, [3])
    assert [bits(p) for p in params_of(optimizer)] == weights
    state_of(optimizer, index)[name] = old
    train(optimizer, [3])
    assert snapshot(optimizer) == snapshot(trained(4))


def test_missing_tensor_and_state_of_another_optimizer_are_refused() -> None:
    optimizer = trained()
    del state_of(optimizer, 0)["codes"]
    with pytest.raises(CheckpointMismatchError, match=r"parameter 0 of shape \(40, 136\) has .*expected .*'codes'"):
        train(optimizer, [3])
    adamw, fresh = torch.optim.AdamW(make_params(SHAPES)), trained(0)
    train(adamw, [0])
    for p, q in zip(params_of(fresh), params_of(adamw), strict=True):
        fresh.state[p] = adamw.state[q]
    with pytest.raises(CheckpointMismatchError, match=r"'exp_avg'.*expected \['bucket_hi'"):
        train(fresh, [0])


def test_ranges_of_2_bits_are_refused_by_version() -> None:
    old, new = (microadam(make_params(SHAPES), ef_bits=2) for _ in range(2))
    train(old, [0])
    saved = old.state_dict()
    for state in saved["state"].values():
        scale = state.pop("bucket_scale", None)
        if scale is not None:
            state |= {"bucket_lo": -scale, "bucket_hi": scale}
    with pytest.raises(CheckpointMismatchError, match=r"Before version 0\.2 .*ef_bits=2.* start without its state"):
        new.load_state_dict(saved)
    assert not new.state


def test_tensor_that_takes_the_place_of_a_freed_one_is_seen() -> None:
    """A new tensor often has the address of the one that was freed before it."""
    optimizer = trained()
    for _ in range(20):
        shape = state_of(optimizer, 0).pop("codes").shape
        state_of(optimizer, 0)["codes"] = torch.zeros(shape, dtype=torch.int8)
        with pytest.raises(CheckpointMismatchError, match="'codes'"):
            train(optimizer, [3])
        state_of(optimizer, 0)["codes"] = torch.zeros(shape, dtype=torch.uint8)
        train(optimizer, [3])


# ---------------------------------------------------------------- used

STEPS: dict[str, Callable[[Tensor], Any]] = {
    "number": int,
    "float": float,
    "fp32": Tensor.float,
    "bf16": Tensor.bfloat16,
    "int32": Tensor.int,
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("through_state_dict", [False, True])
def test_step_of_any_type_is_the_same_step(kind: str, through_state_dict: bool) -> None:
    optimizer = trained()
    if through_state_dict:
        state_dict = copy.deepcopy(optimizer.state_dict())
        for state in state_dict["state"].values():
            state["step"] = STEPS[kind](state["step"])
        optimizer.load_state_dict(state_dict)
    else:
        for p in params_of(optimizer):
            optimizer.state[p]["step"] = STEPS[kind](optimizer.state[p]["step"])
    train(optimizer, [3])
    assert snapshot(optimizer) == snapshot(trained(4))


@pytest.mark.parametrize("saved_at_once", [False, True])
def test_state_put_into_a_fresh_optimizer_goes_on(saved_at_once: bool) -> None:
    optimizer, fresh = trained(), trained(0)
    for p, q in zip(params_of(fresh), params_of(optimizer), strict=True):
        p.data.copy_(q)
        fresh.state[p] = copy.deepcopy(dict(optimizer.state[q]))
    if saved_at_once:
        saved = fresh.state_dict()
        assert saved["microadam"] == optimizer.state_dict()["microadam"]
        assert fresh.sharded.flat_state(params_of(fresh)[0]) is not None
        fresh.load_state_dict(saved)
    for p in params_of(fresh):
        p.grad = torch.zeros_like(p)  # no probe: there is state
    fresh.step()
    assert steps_of(fresh) == [4] * len(SHAPES)


def _resume_zero_redundancy(rank: int, world_size: int) -> list[Any]:
    def make() -> ZeroRedundancyOptimizer:
        params = make_params(SHAPES)
        return ZeroRedundancyOptimizer(params, MicroAdam, **MicroAdam.paper_defaults())

    optimizer, fresh = make(), make()
    train(optimizer, range(3))
    optimizer.consolidate_state_dict(to=0)
    box = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box)
    for p, q in zip(params_of(fresh), params_of(optimizer), strict=True):
        p.data.copy_(q)
    fresh.load_state_dict(box[0])
    train(fresh, range(3, 5))
    return [bits(p) for p in params_of(fresh)]


def test_zero_redundancy_optimizer_resumes() -> None:
    expected = [bits(p) for p in params_of(trained(5))]
    assert run_ranks(_resume_zero_redundancy, 2) == [expected] * 2


def test_keys_of_wrappers_are_left_alone_and_saved() -> None:
    def wrapped() -> MicroAdam:
        optimizer = trained(0)
        for p in params_of(optimizer):
            optimizer.state[p]["slow_buffer"] = p.detach().double()
        optimizer.state[params_of(optimizer)[0]]["note"] = ["since", 0]
        return optimizer

    optimizer = wrapped()
    slow = [state_of(optimizer, i)["slow_buffer"] for i in range(3)]
    train(optimizer, range(3), skip=lambda seed, index: index == 2)  # a state without ours
    assert [state_of(optimizer, i)["slow_buffer"] is slow[i] for i in range(3)] == [True] * 3
    for given in (optimizer.state_dict(), {k: v for k, v in optimizer.state_dict().items() if k != "microadam"}):
        again = trained(0)
        again.load_state_dict(given)
        for index in range(3):
            loaded = state_of(again, index)["slow_buffer"]
            assert bits(loaded) == bits(slow[index]) and loaded is not slow[index]
        assert state_of(again, 0)["note"] == ["since", 0] and state_of(again, 2).keys() == {"slow_buffer"}
        for p, q in zip(params_of(again), params_of(trained(3)), strict=True):
            p.data.copy_(q)
        train(again, [3])
        assert steps_of(again) == [4, 4, 1]


@pytest.mark.parametrize("window_size", [10, 1])
def test_state_dict_without_a_later_setting_has_what_it_was_then(window_size: int) -> None:
    optimizer = trained(window_size=window_size)
    older = copy.deepcopy(optimizer.state_dict())
    for name in LATER_SETTINGS:
        del older["param_groups"][0][name]
    again = trained(0, window_size=window_size)
    again.load_state_dict(older)
    assert again.param_groups[0]["packed_window"] is False and steps_of(again) == [3] * 3
    if window_size > 1:
        with pytest.raises(CheckpointMismatchError, match="packed_window=False"):
            trained(0, packed_window=True).load_state_dict(older)


def test_model_in_another_dtype() -> None:
    model = nn.Sequential(nn.Linear(136, 40), nn.Linear(40, 16))
    optimizer = microadam(model.named_parameters())
    train(optimizer, range(2))
    model.double()
    before = snapshot(optimizer)
    with pytest.raises(ConfigError, match=r"'0.weight' is torch.float64 now.* fp32, bf16, fp16"):
        train(optimizer, [2])
    assert snapshot(optimizer) == before
    model.bfloat16()
    half = microadam([p.detach().clone().requires_grad_() for p in model.parameters()])
    half.load_state_dict(optimizer.state_dict())
    train(optimizer, range(2, 5))
    train(half, range(2, 5))
    assert snapshot(half) == snapshot(optimizer)


# ---------------------------------------------------------------- as torch.optim.AdamW does


def _make(kind: type[Optimizer], *names: str) -> Optimizer:
    params = make_params(SHAPES)
    return kind(list(zip(names, params, strict=True)) if names else params)


@pytest.mark.parametrize("saved, into", [("abc", "xyz"), ("", "xyz"), ("abc", "")])
def test_param_names_survive_loading_as_in_torch(saved: str, into: str) -> None:
    names = []
    for kind in (MicroAdam, torch.optim.AdamW):
        optimizer, again = _make(kind, *saved), _make(kind, *into)
        train(optimizer, [0])
        again.load_state_dict(optimizer.state_dict())
        names.append(again.param_groups[0].get("param_names"))
    assert names[0] == names[1]


def _hooked(kind: type[Optimizer]) -> list[Any]:
    """What hooks see, and what comes out: one replaces the state dict in both directions."""
    seen: list[Any] = []

    def look(event: str) -> Callable[..., None]:
        def hook(optimizer: Optimizer, *state_dict: dict[str, Any]) -> None:
            keys = [sorted(given.keys() - {"microadam"}) for given in state_dict]
            seen.append((event, keys, len(optimizer.state), torch.is_grad_enabled()))

        return hook

    optimizer, again = _make(kind), _make(kind)
    train(optimizer, [0])
    for each in (optimizer, again):
        each.register_state_dict_pre_hook(look("before saving"))
        each.register_state_dict_post_hook(look("saved"))
        each.register_state_dict_post_hook(lambda _, given: {"inside": given})
        each.register_state_dict_post_hook(look("saved inside"))
        each.register_load_state_dict_pre_hook(look("before loading"))
        each.register_load_state_dict_pre_hook(lambda _, given: given["inside"])
        each.register_load_state_dict_pre_hook(look("before loading inside"))
        each.register_load_state_dict_post_hook(look("loaded"))
    again.load_state_dict(optimizer.state_dict())
    seen.append(sorted(again.state_dict()))
    return seen


def test_state_dict_hooks_see_what_they_see_in_torch() -> None:
    assert _hooked(MicroAdam) == _hooked(torch.optim.AdamW)
