"""A checkpoint is exact: a resumed run has the bits of an uninterrupted one, and what does not fit changes nothing."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from microadam_dist import CheckpointMismatchError, MicroAdam
from microadam_dist.checkpoint.format import read_layouts
from microadam_dist.config import LATER_SETTINGS, SETTING_NAMES, MicroAdamConfig
from microadam_dist.layout import ShardSpan, StateLayout
from tests.unit.training import make_params, microadam, params_of, snapshot, steps_of, train

SHAPES = [(40, 136), (40,), (16, 32, 3, 3)]


def make_optimizer(dtype: torch.dtype = torch.float32, **overrides: Any) -> MicroAdam:
    return microadam(make_params(SHAPES, dtype), **{"weight_decay": 0.1, "backend": "reference", **overrides})


def everything(optimizer: Optimizer) -> list[Any]:
    """The bits of every parameter and its state, and the settings of every group."""
    return snapshot(optimizer) + [{**group, "params": len(group["params"])} for group in optimizer.param_groups]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(optimizer: MicroAdam, fresh: MicroAdam, state_dict: dict[str, Any] | None = None) -> MicroAdam:
    """``fresh`` with the weights of ``optimizer`` and the state dict, by default its own, through a file."""
    with torch.no_grad():
        for p, q in zip(params_of(fresh), params_of(optimizer), strict=True):
            p.copy_(q)
    fresh.load_state_dict(through_a_file(optimizer.state_dict() if state_dict is None else state_dict))
    return fresh


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# 7 steps are below, above and far above the window.
@pytest.mark.parametrize("window_size, packed_window", [(10, False), (3, False), (3, True), (1, False)])
def test_resume_is_bit_exact(dtype: torch.dtype, window_size: int, packed_window: bool) -> None:
    settings = {"window_size": window_size, "packed_window": packed_window}
    optimizer = make_optimizer(dtype, **settings)
    train(optimizer, range(7))
    again = resumed(optimizer, make_optimizer(dtype, **settings))
    assert everything(again) == everything(optimizer)
    for seed in range(7, 27):
        train(optimizer, [seed])
        train(again, [seed])
        assert everything(again) == everything(optimizer)
    assert steps_of(again) == [27] * len(SHAPES)


@pytest.mark.parametrize("ef_bits", [0, 1, 1.6, 2, 8])
@pytest.mark.parametrize("window_size", [1, 4])
def test_resume_with_other_error_feedback(ef_bits: float, window_size: int) -> None:
    overrides = {"ef_bits": ef_bits, "window_size": window_size, "bucket_size": 10, "block_size": 64, "density": 0.05}
    optimizer = make_optimizer(**overrides)
    train(optimizer, range(5))
    again = resumed(optimizer, make_optimizer(**overrides))
    train(optimizer, range(5, 12))
    train(again, range(5, 12))
    assert everything(again) == everything(optimizer)


def test_resume_before_the_first_step() -> None:
    optimizer = make_optimizer()
    again = make_optimizer()
    train(again, range(3))
    resumed(optimizer, again)
    assert not again.state
    train(optimizer, range(3))
    train(again, range(3))
    assert everything(again) == everything(optimizer)


def test_state_before_the_first_step_forgets_the_synthetic_one_too() -> None:
    """After loading "no state" an all-zero call only allocates, as on a fresh optimizer."""
    again = make_optimizer()
    train(again, [0])
    again.load_state_dict(make_optimizer().state_dict())
    for p in params_of(again):
        p.grad = torch.zeros_like(p)
    again.step()
    assert steps_of(again) == [0] * len(SHAPES)


def test_resume_with_parameters_that_skipped_steps() -> None:
    def skip(seed: int, index: int) -> bool:
        return index == 2 and seed < 9 or index == 0 and seed % 2 == 0

    optimizer = make_optimizer(window_size=3)
    train(optimizer, range(7), skip)
    state_dict = optimizer.state_dict()
    assert [int(state_dict["state"][index]["step"]) for index in (0, 1)] == [3, 7]
    assert 2 not in state_dict["state"]  # it has had no gradient yet
    again = resumed(optimizer, make_optimizer(window_size=3))
    train(optimizer, range(7, 15), skip)
    train(again, range(7, 15), skip)
    assert everything(again) == everything(optimizer)


def test_resume_with_groups_of_different_settings() -> None:
    def make() -> MicroAdam:
        first, second, third = make_params(SHAPES)
        groups = [
            {"params": [first], "window_size": 2, "density": 0.05},
            {"params": [second, third], "lr": 0.5, "betas": (0.5, 0.9)},
        ]
        return microadam(groups)

    optimizer = make()
    train(optimizer, range(4))
    optimizer.param_groups[1]["lr"] = 0.125  # as a scheduler would
    again = resumed(optimizer, make())
    assert [group["lr"] for group in again.param_groups] == [1e-3, 0.125]
    train(optimizer, range(4, 9))
    train(again, range(4, 9))
    assert everything(again) == everything(optimizer)


def test_state_dict_is_loaded_over_existing_state() -> None:
    optimizer, busy = make_optimizer(), make_optimizer()
    train(optimizer, range(4))
    train(busy, range(50, 63))
    resumed(optimizer, busy)
    train(optimizer, range(4, 8))
    train(busy, range(4, 8))
    assert everything(busy) == everything(optimizer)


def test_no_tensor_is_cast_to_the_dtype_of_the_parameter() -> None:
    """What torch's own ``load_state_dict`` does; codes and indices would turn into rubbish."""
    optimizer = make_optimizer(torch.bfloat16)
    train(optimizer, range(2))
    again = resumed(optimizer, make_optimizer(torch.bfloat16))
    state = again.state[params_of(again)[0]]
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "step": torch.int64,
        "codes": torch.uint8,
        "bucket_lo": torch.bfloat16,
        "bucket_hi": torch.bfloat16,
        "indices": torch.uint8,
        "values": torch.bfloat16,
    }


def test_loaded_state_is_a_copy() -> None:
    optimizer, again = make_optimizer(), make_optimizer()
    train(optimizer, range(3))
    again.load_state_dict(optimizer.state_dict())  # not through a file: the tensors are the optimizer's own
    before = everything(optimizer)
    train(again, range(3, 6))
    assert everything(optimizer) == before
    of_again = everything(again)
    train(optimizer, range(6, 9))
    assert everything(again) == of_again


def test_scheduler_resumes_with_the_optimizer() -> None:
    def make() -> tuple[MicroAdam, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = make_optimizer(lr=0.1)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)

    optimizer, scheduler = make()
    for seed in range(5):
        train(optimizer, [seed])
        scheduler.step()
    again, scheduler_again = make()
    resumed(optimizer, again)
    scheduler_again.load_state_dict(scheduler.state_dict())
    for seed in range(5, 12):
        for each, schedule in ((optimizer, scheduler), (again, scheduler_again)):
            train(each, [seed])
            schedule.step()
    assert everything(again) == everything(optimizer)


# ---------------------------------------------------------------- keys and tools


def with_keys(state_dict: dict[str, Any], names: list[Any]) -> dict[str, Any]:
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups, "state": {names[i]: s for i, s in state_dict["state"].items()}}


@pytest.mark.parametrize("names", [["a.weight", "a.bias", "conv"], [17, 3, 0], ["2", "1", "0"]])
@pytest.mark.parametrize("with_layout", [True, False])
def test_state_belongs_to_parameters_by_position_whatever_the_keys(names: list[Any], with_layout: bool) -> None:
    optimizer = make_optimizer()
    train(optimizer, range(4))
    state_dict = with_keys(optimizer.state_dict(), names)
    if not with_layout:  # what tools do that pass on "state" and "param_groups" only
        del state_dict["microadam"]
    again = resumed(optimizer, make_optimizer(), state_dict)
    assert everything(again) == everything(optimizer)


def test_names_may_differ_between_save_and_load() -> None:
    optimizer = microadam([(f"module.{i}", p) for i, p in enumerate(make_params(SHAPES))], weight_decay=0.1)
    train(optimizer, range(4))
    again = resumed(optimizer, make_optimizer())
    train(optimizer, [4])
    train(again, [4])
    assert snapshot(again) == snapshot(optimizer)


@pytest.mark.parametrize("num_before", [0, 4])
@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ],
    ids=["sharded", "full", "flattened"],
)
def test_resume_through_torch_distributed_checkpoint(options: StateDictOptions, num_before: int) -> None:
    """It renames the keys, drops ours, and makes a synthetic zero-gradient step on an optimizer without state."""

    def make() -> tuple[nn.Module, MicroAdam]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64, bias=False))
        return model, microadam(model.parameters(), weight_decay=0.1)

    model, optimizer = make()
    train(optimizer, range(num_before))
    optimizer.zero_grad()
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    model_again, again = make()
    model_again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(model_again, again, saved, options=options)
    train(optimizer, range(10, 14))
    train(again, range(10, 14))
    assert snapshot(again) == snapshot(optimizer)
    assert set(steps_of(again)) == {num_before + 4}


def test_load_hooks_see_what_they_see_on_any_torch_optimizer() -> None:
    optimizer = make_optimizer()
    train(optimizer, range(4))
    expected = optimizer.state_dict()
    renamed = with_keys(expected, ["a", "b", "c"])
    again = make_optimizer()
    seen: list[Any] = []
    again.register_load_state_dict_pre_hook(lambda _, given: seen.append(sorted(given["state"])))
    again.register_load_state_dict_pre_hook(lambda _, given: copy.deepcopy(renamed) if "wrapped" in given else None)
    again.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    again.load_state_dict({**expected, "wrapped": True})
    assert seen == [[0, 1, 2], 3]
    resumed(optimizer, again, renamed)
    assert everything(again) == everything(optimizer)


def test_pre_hook_may_replace_the_state_dict() -> None:
    """The documented use: state of an older model is given to the right parameters by name."""
    optimizer = make_optimizer()
    train(optimizer, range(4))
    again = make_optimizer()
    again.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
    with torch.no_grad():
        for p, q in zip(params_of(again), params_of(optimizer), strict=True):
            p.copy_(q)
    again.load_state_dict({"optimizer": optimizer.state_dict()})
    assert everything(again) == everything(optimizer)


# ---------------------------------------------------------------- mismatches


def adamw_state_dict() -> dict[str, Any]:
    adamw = torch.optim.AdamW(make_params(SHAPES))
    train(adamw, [0])
    return adamw.state_dict()


def saved_by(optimizer: MicroAdam) -> dict[str, Any]:
    train(optimizer, range(3))
    return optimizer.state_dict()


def other_shape() -> dict[str, Any]:
    params = [nn.Parameter(torch.ones(136, 40)), *make_params(SHAPES)[1:]]  # as many elements, other rows
    return saved_by(microadam(params))


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def state_dict() -> dict[str, Any]:
        saved = copy.deepcopy(saved_by(make_optimizer()))
        edit(saved)
        return saved

    return state_dict


def state(index: int, name: str, value: Any) -> Callable[[], dict[str, Any]]:
    """A state dict with one entry replaced; ``value`` may be a function of the old tensor."""

    def edit(saved: dict[str, Any]) -> None:
        entries = saved["state"][index]
        entries[name] = value(entries[name]) if callable(value) else value

    return edited(edit)


def group(**changes: Any) -> Callable[[], dict[str, Any]]:
    return edited(lambda saved: saved["param_groups"][0].update(changes))


def layout(value: Any) -> Callable[[], dict[str, Any]]:
    return edited(lambda saved: saved.update(microadam=value))


def spans(*entries: tuple) -> Callable[[], dict[str, Any]]:
    return edited(lambda saved: saved["microadam"]["tensors"][0].update(spans=list(entries)))


OTHER_SETTINGS = {
    "window_size": 3,
    "density": 0.02,
    "block_size": 64,
    "bucket_size": 32,
    "ef_bits": 8,
    "packed_window": True,
}
WHOLE = ("0", (40, 136), 0, 40 * 136, 0)

MISMATCHES: dict[str, Callable[[], Any]] = {
    # another model or optimizer
    "AdamW": adamw_state_dict,
    "AdamW before its first step": lambda: torch.optim.AdamW(make_params(SHAPES)).state_dict(),
    "other shape": other_shape,
    "other shape, no layout": lambda: {k: v for k, v in other_shape().items() if k != "microadam"},
    "fewer parameters": lambda: saved_by(microadam(make_params(SHAPES)[:2])),
    "more groups": lambda: saved_by(microadam([{"params": [p]} for p in make_params(SHAPES)])),
    "other split into groups": edited(
        lambda saved: saved.update(param_groups=[{**saved["param_groups"][0], "params": p} for p in ([0], [1, 2])])
    ),
    "whole training checkpoint": lambda: {"model": {}, "optimizer": saved_by(make_optimizer())},
    "no state": edited(lambda saved: saved.pop("state")),
    "state of parameters in no group": edited(
        lambda saved: saved.update(state={str(index): entries for index, entries in saved["state"].items()})
    ),
    # settings
    **{
        f"other {name}": (lambda name=name, value=value: saved_by(make_optimizer(**{name: value})))
        for name, value in OTHER_SETTINGS.items()
    },
    "window_size 1": lambda: saved_by(make_optimizer(window_size=1)),
    **{
        f"no {name}": edited(lambda saved, name=name: saved["param_groups"][0].pop(name))
        for name in SETTING_NAMES
        if name not in LATER_SETTINGS
    },
    "no list of parameters": edited(lambda saved: saved["param_groups"][0].pop("params")),
    "impossible lr": group(lr=-1.0),
    "impossible betas": group(betas=None),
    # state tensors
    "codes missing": edited(lambda saved: saved["state"][0].pop("codes")),
    "step missing": edited(lambda saved: saved["state"][1].pop("step")),
    "step is no integer": state(2, "step", torch.tensor(3.5)),
    "step is not finite": state(2, "step", torch.tensor(torch.inf)),
    "step may have been rounded": state(2, "step", torch.tensor(256.0, dtype=torch.bfloat16)),
    "step is true": state(2, "step", torch.tensor(True)),
    "step has a dimension": state(2, "step", torch.tensor([3])),
    "step is negative": state(2, "step", torch.tensor(-1)),
    "step is junk": state(2, "step", "three"),
    "codes are short": state(2, "codes", lambda old: old[:-1]),
    "codes have two dimensions": state(2, "codes", lambda old: old[None]),
    "codes were cast": state(2, "codes", lambda old: old.bfloat16()),
    "values were cast": state(2, "values", lambda old: old.float()),
    "indices were cast": state(2, "indices", lambda old: old.view(torch.int16)),
    "moments were cast": state(1, "exp_avg_sq", lambda old: old.double()),
    "values are a list": state(2, "values", lambda old: old.tolist()),
    "index outside its block": state(2, "indices", lambda old: torch.full_like(old, 255)),
    "codes without data": state(2, "codes", lambda old: old.to("meta")),
    "tensor of the other path": state(2, "exp_avg", torch.zeros(1)),
    "dense state for a sparse parameter": edited(lambda saved: saved["state"].update({0: saved["state"][1]})),
    "state is no mapping": edited(lambda saved: saved["state"].update({0: None})),
    # layout
    "other format": layout({"format": 2, "tensors": {}}),
    "no format": layout({"tensors": {}}),
    "no tensors": layout({"format": 1}),
    "layout is junk": layout("junk"),
    "layout of a name": layout({"format": 1, "tensors": {"weight": {"spans": [WHOLE], "settings": {}}}}),
    "another shard": spans(("0", (80, 136), 40 * 136, 40 * 136, 0)),
    "another offset": spans((*WHOLE[:4], 8)),
    "transposed": spans(("0", (136, 40), 0, 40 * 136, 0)),
    "more spans": spans(WHOLE, ("x", (3,), 0, 3, 40 * 136)),
    "no span": spans(),
    "span is junk": spans((1, 2)),
    "span outside its parameter": spans(("0", (40, 136), 1, 40 * 136, 0)),
}


@pytest.mark.parametrize("num_before", [0, 5])
@pytest.mark.parametrize("kind", MISMATCHES)
def test_mismatch_is_refused_and_changes_nothing(kind: str, num_before: int) -> None:
    optimizer, twin = make_optimizer(), make_optimizer()
    train(optimizer, range(num_before))
    train(twin, range(num_before))
    before = everything(optimizer)
    with pytest.raises(CheckpointMismatchError):
        optimizer.load_state_dict(MISMATCHES[kind]())
    assert everything(optimizer) == before
    train(optimizer, range(5, 8))
    train(twin, range(5, 8))
    assert everything(optimizer) == everything(twin)


@pytest.mark.parametrize(("name", "value"), OTHER_SETTINGS.items())
def test_message_names_the_setting_and_both_values(name: str, value: Any) -> None:
    ours = make_optimizer().param_groups[0][name]
    with pytest.raises(CheckpointMismatchError, match=rf"param group 0 .*has {name}={value}, this optimizer {ours}"):
        make_optimizer().load_state_dict(saved_by(make_optimizer(**{name: value})))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("AdamW", "not written by MicroAdam"),
        ("more groups", r"groups of \[1, 1, 1\] parameters, this optimizer of \[3\]"),
        ("codes are short", r"'codes' of parameter 2 of shape \(16, 32, 3, 3\).*expected torch.uint8 \(16, 144\)"),
        ("values were cast", r"'values' of parameter 2 .*torch.float32 .*expected torch.bfloat16"),
        ("other format", "format 2, this version reads 1"),
        ("another shard", r"parameter 0 .*another number of ranks"),
    ],
)
def test_message_says_what_is_wrong(kind: str, message: str) -> None:
    with pytest.raises(CheckpointMismatchError, match=message):
        make_optimizer().load_state_dict(MISMATCHES[kind]())


def test_state_dict_tells_which_part_of_which_parameter_it_describes() -> None:
    names = ["w", "b", "conv"]
    optimizer = microadam(list(zip(names, make_params(SHAPES), strict=True)), density=0.5)
    assert read_layouts(optimizer.state_dict()["microadam"]) == {}
    train(optimizer, [0])
    layouts = read_layouts(through_a_file(optimizer.state_dict())["microadam"])
    assert layouts == {
        index: StateLayout(
            (ShardSpan(name, shape, start=0, numel=torch.Size(shape).numel(), offset=0),),
            MicroAdamConfig(window_size=10, density=0.5),
        )
        for index, (name, shape) in enumerate(zip(names, SHAPES, strict=True))
    }
