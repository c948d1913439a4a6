"""Param groups, parameters that come, go and have no gradient, names, and copies of an optimizer.

"The same" means the same bits, see `test_optimizer`.
"""

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from microadam_dist import ConfigError, MicroAdam, MicroAdamError, UnsupportedLayoutError
from microadam_dist.checkpoint.format import read_layouts

from .training import SHAPES, bits, gradient, make_params, microadam, params_of, snapshot, steps_of, train

# ---------------------------------------------------------------- groups and parameters


def test_groups_are_as_independent_as_optimizers() -> None:
    own = [
        {"lr": 0.1, "density": 0.05, "window_size": 2},
        {"weight_decay": 0.2, "block_size": 128, "bucket_size": 16},
        {"betas": (0.5, 0.9), "eps": 1e-4},
        {"window_size": 1},
    ]
    together = microadam([{"params": [p], **o} for p, o in zip(make_params(SHAPES), own, strict=True)])
    apart = [microadam([p], **o) for p, o in zip(make_params(SHAPES), own, strict=True)]
    for seed in range(6):
        train(together, [seed])
        for index, optimizer in enumerate(apart):
            [p] = params_of(optimizer)
            p.grad = gradient(p, seed, index)
            optimizer.step()
    assert snapshot(together) == [entry for optimizer in apart for entry in snapshot(optimizer)]


def test_parameter_without_gradient_keeps_its_own_step() -> None:
    optimizer = microadam(make_params(SHAPES), weight_decay=0.1, window_size=3)
    alone = [microadam([p], weight_decay=0.1, window_size=3) for p in make_params(SHAPES)]
    for seed in range(8):
        for index, p in enumerate(params_of(optimizer)):
            p.grad = gradient(p, seed, index) if (seed + 1) % (index + 1) == 0 else None
            if p.grad is not None:
                [twin] = params_of(alone[index])
                twin.grad = p.grad.clone()
                alone[index].step()
        optimizer.step()
    assert steps_of(optimizer) == [8, 4, 2, 2]
    assert snapshot(optimizer) == [entry for single in alone for entry in snapshot(single)]


def test_frozen_parameter_has_no_state_until_it_is_thawed() -> None:
    frozen, trained = make_params(SHAPES[:2])
    frozen.requires_grad_(False)
    optimizer = microadam([frozen, trained])
    start = bits(frozen)
    for seed in range(3):
        trained.grad = gradient(trained, seed)
        optimizer.step()
    assert bits(frozen) == start
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(optimizer, [3])
    assert steps_of(optimizer) == [1, 4]


@pytest.mark.parametrize("shape", [(0,), (0, 128), (128, 0)])
def test_empty_parameter(shape: tuple[int, ...]) -> None:
    with_empty, without = microadam(make_params([shape, *SHAPES])), microadam(make_params(SHAPES))
    for seed in range(3):
        for first, optimizer in ((1, with_empty), (0, without)):
            for index, p in enumerate(params_of(optimizer)[first:]):
                p.grad = gradient(p, seed, index)
        params_of(with_empty)[0].grad = torch.empty(shape)
        with_empty.step()
        without.step()
    assert snapshot(with_empty)[1:] == snapshot(without)
    assert steps_of(with_empty)[0] == 3


def test_named_parameters_step_like_unnamed_ones() -> None:
    named = microadam([(f"layer{i}", p) for i, p in enumerate(make_params(SHAPES))])
    unnamed = microadam(make_params(SHAPES))
    train(named, range(3))
    train(unnamed, range(3))
    assert snapshot(named) == snapshot(unnamed)
    assert named.state_dict()["param_groups"][0]["param_names"] == ["layer0", "layer1", "layer2", "layer3"]
    layouts = read_layouts(named.state_dict()["microadam"])
    assert [layouts[index].spans[0].fqn for index in range(4)] == ["layer0", "layer1", "layer2", "layer3"]


def test_unnamed_parameters_are_named_by_their_position_over_all_groups() -> None:
    *first, last = make_params(SHAPES)
    optimizer = microadam([{"params": first[:2]}, {"params": first[2:]}])
    optimizer.add_param_group({"params": [last]})
    train(optimizer, [0])
    layouts = read_layouts(optimizer.state_dict()["microadam"])
    assert [layouts[index].spans[0].fqn for index in range(4)] == ["0", "1", "2", "3"]


def test_group_added_later_starts_at_its_own_first_step() -> None:
    [early, late] = make_params(SHAPES[:2])
    optimizer, alone = microadam([early]), microadam(make_params(SHAPES[:2])[1:], lr=0.5)
    train(optimizer, range(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    for seed in range(3):
        train(optimizer, [seed])
        [p] = params_of(alone)
        p.grad = gradient(p, seed, index=1)
        alone.step()
    assert steps_of(optimizer) == [6, 3]
    assert snapshot(optimizer)[1:] == snapshot(alone)


def test_tensor_that_is_not_in_the_model_is_refused() -> None:
    optimizer = microadam(make_params(SHAPES))
    train(optimizer, [0])
    before = snapshot(optimizer)
    stranger = make_params([(64, 64)])[0]
    stranger.grad = torch.ones_like(stranger)
    optimizer.param_groups[0]["params"].append(stranger)
    with pytest.raises(UnsupportedLayoutError, match=r"\(64, 64\) at position 4"):
        optimizer.step()
    assert snapshot(optimizer)[:-1] == before


def test_parameter_that_changed_its_shape_is_refused() -> None:
    """Its state describes the old shape; a kernel would read and write past the end."""
    optimizer = microadam(make_params([(40, 136)]), backend="reference")
    train(optimizer, [0])
    [p] = params_of(optimizer)
    for rows in (32, 80):
        p.grad = None
        p.data = torch.ones(rows, 136)
        before = snapshot(optimizer)
        with pytest.raises(MicroAdamError, match=rf"\({rows}, 136\)"):
            train(optimizer, [1])
        assert snapshot(optimizer) == before


@pytest.mark.parametrize("reset", [lambda o: o.state.clear(), lambda o: setattr(o, "state", defaultdict(dict))])
def test_cleared_state_is_a_fresh_start(reset: Callable[[MicroAdam], None]) -> None:
    optimizer = microadam(make_params(SHAPES))
    train(optimizer, range(3))
    fresh = microadam([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)])
    reset(optimizer)
    train(optimizer, range(3))
    train(fresh, range(3))
    assert snapshot(optimizer) == snapshot(fresh)


def test_state_bytes_is_what_was_allocated() -> None:
    optimizer = microadam(make_params(SHAPES))
    assert optimizer.state_bytes() == (0, 0, 0, 0)
    train(optimizer, [0])
    tensors = [(name, t) for p in params_of(optimizer) for name, t in optimizer.state[p].items() if name != "step"]
    dense = sum(t.nbytes for name, t in tensors if name.startswith("exp_"))
    total = sum(t.nbytes for _, t in tensors)
    assert optimizer.state_bytes() == (40 * 136 + 32 * 144, total - dense, 136 + 32, dense)
    assert dense == 8 * (136 + 32)


# ---------------------------------------------------------------- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("num_before", [0, 5])
@pytest.mark.parametrize("how", COPIES)
def test_copy_continues_bit_for_bit_and_on_its_own(how: str, num_before: int) -> None:
    original, untouched = microadam(make_params(SHAPES), window_size=3), microadam(make_params(SHAPES), window_size=3)
    train(original, range(num_before))
    train(untouched, range(num_before))
    copied = COPIES[how](original)
    train(copied, range(5, 12))
    assert snapshot(original) == snapshot(untouched)
    train(original, range(5, 12))
    assert snapshot(copied) == snapshot(original)
    assert copied.num_nonfinite_blocks == original.num_nonfinite_blocks


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_model_and_optimizer_stay_together(how: str) -> None:
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))
    optimizer = microadam(model.named_parameters(), lr=0.1)
    train(optimizer, [0])
    model_copy, optimizer_copy = COPIES[how]((model, optimizer))
    train(optimizer, [1])
    train(optimizer_copy, [1])
    assert [bits(p) for p in model_copy.parameters()] == [bits(p) for p in model.parameters()]
    optimizer_copy.add_param_group({"params": [("extra", make_params([(64, 64)])[0])]})
    train(optimizer_copy, [2])


def test_setting_that_became_invalid_changes_nothing() -> None:
    optimizer = microadam([{"params": [p]} for p in make_params(SHAPES)])
    train(optimizer, range(2))
    before = snapshot(optimizer)
    optimizer.param_groups[-1]["lr"] = torch.nan
    with pytest.raises(ConfigError, match="lr=nan"):
        train(optimizer, [2])
    assert snapshot(optimizer) == before
