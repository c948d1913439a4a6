"""MicroAdam as a citizen of torch: schedulers, GradScaler, closures, memory formats, skipped and non-finite gradients.

"The same" always means the same bits of parameters and state: MicroAdam is chaotic, so close trajectories say nothing.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microadam_dist import MicroAdam, UnsupportedLayoutError

from .training import SHAPES, bits, gradient, make_params, microadam, params_of, snapshot, steps_of, train

# ---------------------------------------------------------------- schedulers


def as_tensor(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


@pytest.mark.parametrize("lr_type", [float, as_tensor])
def test_lambda_lr_is_setting_lr_by_hand(lr_type: Callable[[float], Any]) -> None:
    scheduled = microadam(make_params(SHAPES), lr=lr_type(0.5), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda epoch: 0.75**epoch)
    by_hand = microadam(make_params(SHAPES), weight_decay=0.01)
    constant = microadam(make_params(SHAPES), lr=0.5, weight_decay=0.01)
    for seed in range(6):
        train(scheduled, [seed])
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.5 * 0.75**seed
        train(by_hand, [seed])
        train(constant, [seed])
    assert snapshot(scheduled) == snapshot(by_hand) != snapshot(constant)


def test_one_cycle_lr_cycles_lr_and_beta1() -> None:
    scheduled, by_hand = microadam(make_params(SHAPES), betas=(0.5, 0.99)), microadam(make_params(SHAPES))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(scheduled, max_lr=0.1, total_steps=8)
    seen = set()
    for seed in range(8):
        by_hand.param_groups[0] |= {"lr": scheduled.param_groups[0]["lr"], "betas": scheduled.param_groups[0]["betas"]}
        seen.add(scheduled.param_groups[0]["betas"])
        train(scheduled, [seed])
        train(by_hand, [seed])
        if seed < 7:
            scheduler.step()
    assert snapshot(scheduled) == snapshot(by_hand)
    assert len(seen) > 4
    assert {beta2 for _, beta2 in seen} == {0.99}


def test_tensor_lr_is_read_at_every_step() -> None:
    lr = torch.tensor(0.25)
    first, second = microadam(make_params(SHAPES), lr=lr), microadam(make_params(SHAPES), lr=0.25)
    train(first, range(3))
    train(second, range(3))
    assert snapshot(first) == snapshot(second)
    lr.fill_(0.125)
    second.param_groups[0]["lr"] = 0.125
    train(first, [3])
    train(second, [3])
    assert snapshot(first) == snapshot(second)


# ---------------------------------------------------------------- GradScaler


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Optimizer, seed: int, *, unscale: bool = False) -> None:
    """A backward pass whose unscaled gradients are those of `train`."""
    optimizer.zero_grad()
    loss = sum((p * gradient(p, seed, index)).sum() for index, p in enumerate(params_of(optimizer)))
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients_give_the_bits_of_unscaled_ones(unscale: bool) -> None:
    scaled, plain = microadam(make_params(SHAPES)), microadam(make_params(SHAPES))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for seed in range(6):
        scaled_step(scaler, scaled, seed, unscale=unscale)
    train(plain, range(6))
    assert scaler.get_scale() == 2.0**15
    assert snapshot(scaled) == snapshot(plain)


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_overflow_skips_the_whole_step(num_before: int, value: float) -> None:
    optimizer = microadam(make_params(SHAPES))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(num_before):
        scaled_step(scaler, optimizer, seed)
    before = snapshot(optimizer)

    for p in params_of(optimizer):
        p.grad = torch.ones_like(p)
    params_of(optimizer)[2].grad[7] = value
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() == 4.0
    assert snapshot(optimizer) == before
    assert bool(optimizer.state) == bool(num_before)
    assert optimizer.num_nonfinite_blocks == 0


def test_scaler_step_without_any_gradient_is_refused_as_for_adamw() -> None:
    for optimizer in (microadam(make_params(SHAPES)), torch.optim.AdamW(make_params(SHAPES))):
        before = snapshot(optimizer)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.step(optimizer)
        assert snapshot(optimizer) == before


def test_scaled_gradients_are_clipped_like_unscaled_ones() -> None:
    scaled, plain = microadam(make_params(SHAPES)), microadam(make_params(SHAPES))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for seed in range(4):
        scaled.zero_grad()
        scaler.scale(sum((p * gradient(p, seed, i)).sum() for i, p in enumerate(params_of(scaled)))).backward()
        scaler.unscale_(scaled)
        norms = [nn.utils.clip_grad_norm_(params_of(scaled), 1.0)]
        scaler.step(scaled)
        scaler.update()
        for index, p in enumerate(params_of(plain)):
            p.grad = gradient(p, seed, index)
        norms.append(nn.utils.clip_grad_norm_(params_of(plain), 1.0))
        plain.step()
        assert norms[0] == norms[1] > 1
    assert snapshot(scaled) == snapshot(plain)


# ---------------------------------------------------------------- closures and gradients


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    optimizer, plain = microadam(make_params(SHAPES)), microadam(make_params(SHAPES))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p * gradient(p, 0, index)).sum() for index, p in enumerate(params_of(optimizer)))
        loss.backward()
        return loss

    expected = sum((p * gradient(p, 0, index)).sum() for index, p in enumerate(params_of(optimizer)))
    with torch.no_grad():
        assert torch.equal(optimizer.step(closure), expected)
    train(plain, [0])
    assert snapshot(optimizer) == snapshot(plain)
    assert optimizer.step() is None


CONV, MATRIX = (32, 16, 3, 3), (40, 136)
MEMORY_FORMATS = {
    "transposed": (MATRIX, lambda t: t.t().contiguous().t()),
    "every second column": (MATRIX, lambda t: t.repeat_interleave(2, dim=1)[:, ::2]),
    "inside a larger tensor": (MATRIX, lambda t: torch.cat([t, t])[40:]),
    "channels last": (CONV, lambda t: t.contiguous(memory_format=torch.channels_last)),
    "dense path, strided": ((200,), lambda t: torch.stack([t, t], dim=1)[:, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("name", MEMORY_FORMATS)
def test_memory_format_changes_no_bit(name: str, where: str, dtype: torch.dtype) -> None:
    shape, strided = MEMORY_FORMATS[name]
    [contiguous] = make_params([shape], dtype)
    param = nn.Parameter(strided(contiguous.detach()) if where != "gradient" else contiguous.detach().clone())
    stride, address = param.stride(), param.data_ptr()
    optimizer, plain = microadam([param], weight_decay=0.1), microadam([contiguous], weight_decay=0.1)
    for seed in range(12):
        grad = gradient(param, seed)
        param.grad = strided(grad) if where != "parameter" else grad
        optimizer.step()
    train(plain, range(12))
    assert (param.stride(), param.data_ptr()) == (stride, address)
    assert snapshot(optimizer) == snapshot(plain)


@pytest.mark.parametrize("name", MEMORY_FORMATS)
def test_gradient_is_not_touched(name: str) -> None:
    shape, strided = MEMORY_FORMATS[name]
    [param] = make_params([shape])
    optimizer = microadam([param], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        grad = param.grad = strided(gradient(param, seed))
        before, version = bits(grad), grad._version
        optimizer.step()
        assert param.grad is grad
        assert (bits(grad), grad._version) == (before, version)


def test_group_without_gradients_is_left_alone() -> None:
    trained, frozen = (torch.ones(64, 64, requires_grad=True) for _ in range(2))
    trained.grad = torch.ones_like(trained)
    optimizer = microadam([{"params": [trained]}, {"params": [frozen]}])
    optimizer.step()
    assert int(optimizer.state[trained]["step"]) == 1
    assert frozen not in optimizer.state and torch.equal(frozen, torch.ones(64, 64))


def test_sparse_gradient_is_refused_before_anything_changes() -> None:
    dense, embedding = nn.Linear(128, 64), nn.Embedding(64, 128, sparse=True)
    optimizer = microadam([*dense.parameters(), *embedding.parameters()])
    before = snapshot(optimizer)
    dense(embedding(torch.arange(5))).sum().backward()
    with pytest.raises(UnsupportedLayoutError, match=r"\(64, 128\) has a sparse gradient"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert not optimizer.state


# ---------------------------------------------------------------- the first step


def zero_gradients(optimizer: Optimizer) -> None:
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("num_calls", [0, 1])
def test_first_call_with_zero_gradients_only_allocates(num_calls: int) -> None:
    optimizer, plain = (microadam(make_params(SHAPES), lr=0.1, weight_decay=0.5) for _ in range(2))
    zero_gradients(optimizer)
    weights = [bits(p) for p in params_of(optimizer)]
    for _ in range(num_calls):
        optimizer.step()
        assert all(optimizer.state[p].keys() > {"step"} for p in params_of(optimizer))
        assert not any(t.any() for p in params_of(optimizer) for t in optimizer.state[p].values())
        assert [bits(p) for p in params_of(optimizer)] == weights
    train(optimizer, range(4))
    train(plain, range(4))
    assert snapshot(optimizer) == snapshot(plain)


def test_second_call_with_zero_gradients_counts() -> None:
    optimizer = microadam(make_params(SHAPES))
    zero_gradients(optimizer)
    optimizer.step()
    optimizer.step()
    assert steps_of(optimizer) == [1] * len(SHAPES)


def test_zero_gradient_after_a_real_step_counts() -> None:
    optimizer = microadam(make_params(SHAPES))
    train(optimizer, [0])
    zero_gradients(optimizer)
    optimizer.step()
    assert steps_of(optimizer) == [2] * len(SHAPES)


@pytest.mark.parametrize("nonzero", range(len(SHAPES)))
def test_zero_gradient_of_some_parameters_counts(nonzero: int) -> None:
    """An embedding shard whose rows saw no token must not fall behind the other ranks."""
    optimizer = microadam([{"params": [p]} for p in make_params(SHAPES)], lr=0.25, weight_decay=0.5)
    zero_gradients(optimizer)
    params = params_of(optimizer)
    before = [p.detach().clone() for p in params]
    params[nonzero].grad.view(-1)[-1] = 1e-30
    optimizer.step()
    assert steps_of(optimizer) == [1] * len(SHAPES)
    for index, (p, old) in enumerate(zip(params, before, strict=True)):
        if index != nonzero:
            assert torch.equal(p, old * 0.875)


def test_call_without_any_gradient_does_nothing() -> None:
    optimizer = microadam(make_params(SHAPES))
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
    assert not optimizer.state


# ---------------------------------------------------------------- non-finite gradients

NOT_FINITE = [torch.nan, torch.inf, -torch.inf, 2.0**60, -(2.0**61), 2.0**60 - 2.0**51]  # the last rounds up in bf16
BLOCK_ROWS, BLOCK_NUMEL, NUM_KEPT = 9, 512, 6  # one block per row: 512 elements, 6 kept


def one_block_a_row(window_size: int) -> MicroAdam:
    return microadam(make_params([(BLOCK_ROWS, BLOCK_NUMEL)]), weight_decay=0.1, window_size=window_size)


def empty_the_slot(optimizer: MicroAdam, row: int, before: MicroAdam) -> None:
    """Make the last step of the block in ``row`` one that was skipped, by the definition in algorithm.md."""
    [p], [old] = params_of(optimizer), params_of(before)
    window_size = optimizer.param_groups[0]["window_size"]
    p.data[row] = old.data[row]
    for name in ("codes", "bucket_lo", "bucket_hi"):
        optimizer.state[p][name].view(BLOCK_ROWS, -1)[row] = before.state[old][name].view(BLOCK_ROWS, -1)[row]
    if window_size > 1:
        slot = (int(optimizer.state[p]["step"]) - 1) % window_size
        window = (BLOCK_ROWS, window_size, NUM_KEPT)
        optimizer.state[p]["values"].view(window)[row, slot] = 0
        optimizer.state[p]["indices"].view(torch.int16).view(window)[row, slot] = torch.arange(NUM_KEPT).short()


@pytest.mark.filterwarnings("ignore:MicroAdam skipped")
@pytest.mark.parametrize("window_size", [1, 3])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_nonfinite_block_is_skipped_alone(value: float, window_size: int) -> None:
    optimizer, twin = one_block_a_row(window_size), one_block_a_row(window_size)
    train(optimizer, range(4))
    train(twin, range(4))
    before = copy.deepcopy(twin)

    [p] = params_of(optimizer)
    p.grad = gradient(p, 4)
    p.grad[5, 77] = value
    optimizer.step()
    train(twin, [4])
    empty_the_slot(twin, row=5, before=before)
    assert optimizer.num_nonfinite_blocks == 1
    assert snapshot(optimizer) == snapshot(twin)

    for seed in range(5, 12):  # the block's slot leaves the window again
        train(optimizer, [seed])
        train(twin, [seed])
        assert snapshot(optimizer) == snapshot(twin)
    assert optimizer.num_nonfinite_blocks == 1
    assert bool(p.isfinite().all())


def test_largest_finite_magnitude_is_a_step_like_any_other() -> None:
    optimizer = one_block_a_row(3)
    [p] = params_of(optimizer)
    p.grad = gradient(p, 0)
    p.grad[5, 77] = 2.0**60 - 2.0**52
    optimizer.step()
    train(optimizer, range(1, 5))
    assert optimizer.num_nonfinite_blocks == 0
    assert bool(p.isfinite().all())


@pytest.mark.filterwarnings("ignore:MicroAdam skipped")
@pytest.mark.parametrize("value", NOT_FINITE)
def test_nonfinite_element_is_skipped_alone_on_the_dense_path(value: float) -> None:
    optimizer, twin = microadam(make_params([(100,)])), microadam(make_params([(100,)]))
    train(optimizer, range(3))
    train(twin, range(3))
    [p], [q] = params_of(optimizer), params_of(twin)
    old = {
        "param": q.detach()[7].clone(),
        **{name: t[7].clone() for name, t in twin.state[q].items() if name != "step"},
    }
    p.grad = gradient(p, 3)
    p.grad[7] = value
    optimizer.step()
    train(twin, [3])
    q.data[7] = old.pop("param")
    for name, element in old.items():
        twin.state[q][name][7] = element
    assert optimizer.num_nonfinite_blocks == 1
    assert snapshot(optimizer) == snapshot(twin)


def test_nonfinite_blocks_are_counted_and_warned_about_once() -> None:
    optimizer = one_block_a_row(3)
    [p] = params_of(optimizer)
    p.grad = gradient(p, 0)
    p.grad[0, 3] = p.grad[0, 4] = p.grad[8, 0] = torch.nan
    with pytest.warns(UserWarning, match="skipped 2 blocks .* optimizer.num_nonfinite_blocks") as record:
        optimizer.step()
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        train(optimizer, [1])
    assert optimizer.num_nonfinite_blocks == 4
    assert steps_of(optimizer) == [3]


# ---------------------------------------------------------------- the dense path


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1000,), (50, 63), ()])
def test_dense_path_is_adamw(shape: tuple[int, ...], weight_decay: float) -> None:
    """Within 1e-6 of every weight; weights of 1 to 2 stay away from zero, where relative error means nothing."""
    start = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 1
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": weight_decay}
    optimizer, adamw = microadam([ours], **options), torch.optim.AdamW([theirs], **options)
    for seed in range(50):
        train(optimizer, [seed])
        train(adamw, [seed])
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert not torch.equal(ours, start)
