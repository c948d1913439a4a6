"""Gradient release: the bits of the normal step with one gradient at a time, and an error for all that needs more."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from microadam_dist import ConfigError, MicroAdam, UnsupportedLayoutError, release_gradients
from microadam_dist.optimizer.gradient_release import ReleasedGradient
from tests.ranks import run_ranks

from .models import SETTINGS, assert_same, backward, everything, make_model, make_optimizer, message_of, shard

DTYPES = [torch.float32, torch.bfloat16]


def make(dtype: torch.dtype = torch.float32, *, sharded: bool = False) -> tuple[nn.Module, MicroAdam]:
    model = make_model(dtype)
    if sharded:
        shard(model)
    return model, make_optimizer(model)


def is_released(grad: Tensor | None) -> bool:
    return isinstance(getattr(grad, "_local_tensor", grad), ReleasedGradient)


def live_gradients(optimizer: MicroAdam) -> int:
    params = (p for group in optimizer.param_groups for p in group["params"])
    return sum(p.grad is not None and not is_released(p.grad) for p in params)


def check_same_as_normal_step(dtype: torch.dtype, *, sharded: bool) -> None:
    """Bits, schedule and number of live gradients; then back to the normal step."""
    released, normal = make(dtype, sharded=sharded), make(dtype, sharded=sharded)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.8**epoch) for _, opt in (released, normal)]
    counts = []
    for param in released[0].parameters():  # called before ours
        param.register_post_accumulate_grad_hook(lambda _: counts.append(live_gradients(released[1])))
    release = release_gradients(*released)
    for step in range(20):
        if step == 12:
            release.remove()
            assert live_gradients(released[1]) == 0
        for (model, optimizer), scheduler in zip((released, normal), schedulers, strict=True):
            backward(model, step, dtype)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        assert_same(everything(released[1]), everything(normal[1]))
    num_params = len(list(normal[0].parameters()))
    assert counts == [1] * 12 * num_params + list(range(1, num_params + 1)) * 8


def check_errors(*, sharded: bool) -> None:
    """Whatever reads a released gradient raises, names it, and changes nothing."""
    model, optimizer = make(sharded=sharded)
    release = release_gradients(model, optimizer)
    backward(model, 0)
    before = everything(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    refused: list[Callable[[], Any]] = [
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True),
        lambda: torch.nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda: torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]),
        lambda: scaler.unscale_(optimizer),
        lambda: scaler.step(optimizer),
        lambda: model.embed.weight.grad.sum(),
        lambda: release_gradients(model, optimizer),
    ]
    for function in refused:
        message = message_of(ConfigError, function)
        assert "remove()" in message
        assert "weight'" in message or function is refused[-1]
        assert_same(everything(optimizer), before)

    # Every way to begin the next step: step(), zero_grad(), remove().
    optimizer.step()
    backward(model, 1)
    optimizer.zero_grad()
    backward(model, 2)
    model.zero_grad()
    backward(model, 3)
    release.remove()
    assert all(p.grad is None for p in model.parameters())
    again = release_gradients(model, optimizer)
    backward(model, 4)
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {5}

    # Accumulation. FSDP2 does not go on after an exception in the backward pass, so it comes last.
    before = everything(optimizer)
    assert "remove()" in message_of(ConfigError, lambda: backward(model, 5))
    assert_same(everything(optimizer), before)
    again.remove()


# ---------------------------------------------------------------- one device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_normal_step(dtype: torch.dtype) -> None:
    check_same_as_normal_step(dtype, sharded=False)


def test_what_needs_all_gradients_raises() -> None:
    check_errors(sharded=False)


def test_a_gradient_is_freed_before_the_next_one_is_complete() -> None:
    """Counts tensors, not attributes."""
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
    optimizer = MicroAdam(model.parameters())
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(param: Tensor) -> None:
        seen.append(weakref.ref(param.grad))
        alive.append(sum(ref() is not None for ref in seen))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    release_gradients(model, optimizer)
    for _ in range(2):
        model(torch.ones(2, 128)).sum().backward()
        optimizer.step()
    assert alive == [1] * 12


def test_state_dict_and_first_step_are_those_of_the_optimizer() -> None:
    """A parameter whose first gradient is zero is stepped as well: the others are not."""
    (model, optimizer), (normal, normal_optimizer) = make(), make()
    release_gradients(model, optimizer)
    for step in range(4):
        for each, each_optimizer in ((model, optimizer), (normal, normal_optimizer)):
            grads = {name: torch.zeros_like(getattr(each, name).weight) for name in ("few", "thin")}
            each({"odd": torch.full((40, 301), step + 1.0), **grads}).backward()  # the last one is differentiated first
            each_optimizer.step()
            each_optimizer.zero_grad()
    assert_same(everything(optimizer), everything(normal_optimizer))
    assert optimizer.state[model.few.weight]["step"] == 4
    assert model.embed.weight not in optimizer.state

    optimizer.load_state_dict(normal_optimizer.state_dict())
    for each, each_optimizer in ((model, optimizer), (normal, normal_optimizer)):
        backward(each, 9)
        each_optimizer.step()
    assert_same(everything(optimizer), everything(normal_optimizer))


def test_step_takes_a_closure() -> None:
    (model, optimizer), (normal, normal_optimizer) = make(), make()
    release_gradients(model, optimizer)
    for step in range(3):
        for each, each_optimizer in ((model, optimizer), (normal, normal_optimizer)):

            def closure(each: nn.Module = each, each_optimizer: MicroAdam = each_optimizer, step: int = step) -> str:
                each_optimizer.zero_grad()
                backward(each, step)
                return f"loss {step}"

            assert each_optimizer.step(closure) == f"loss {step}"
    assert_same(everything(optimizer), everything(normal_optimizer))


def test_gradient_that_was_not_released_is_used_by_the_step() -> None:
    """One set by hand, and that of a parameter thawed or added later: nothing is skipped."""
    (model, optimizer), (normal, normal_optimizer) = make(), make()
    late = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    for each in (model, normal):
        each.norm.weight.requires_grad_(False)
    release_gradients(model, optimizer)
    for each, each_optimizer, added in ((model, optimizer, late[0]), (normal, normal_optimizer, late[1])):
        each_optimizer.add_param_group({"params": [("late", added)]})
        each.norm.weight.requires_grad_(True)
        for step in range(3):
            backward(each, step)
            added.grad = torch.ones(64, 64)
            each.odd.weight.grad = torch.full((40, 301), 2.0)
            each_optimizer.step()
            each_optimizer.zero_grad()
    assert torch.equal(*late)
    assert torch.equal(model.norm.weight, normal.norm.weight)
    assert optimizer.state[model.odd.weight]["step"] == 6
    assert optimizer.state[model.norm.weight]["step"] == 3


def test_clipping_each_gradient_before_it_is_released() -> None:
    """What the error recommends."""
    (model, optimizer), (normal, normal_optimizer) = make(), make()

    def clip(param: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_([param], 1.0)

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(clip)
    release_gradients(model, optimizer)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(normal, step)
        for param in normal.parameters():
            clip(param)
        normal_optimizer.step()
        normal_optimizer.zero_grad()
    assert_same(everything(optimizer), everything(normal_optimizer))


def test_backward_that_needs_an_old_weight_raises() -> None:
    """Autograd sees the update, whatever wrote it."""
    linear = nn.Linear(128, 128, bias=False)
    optimizer = MicroAdam(linear.parameters())
    release_gradients(linear, optimizer)
    x = torch.ones(1, 128, requires_grad=True)
    detour = (x * 2) @ linear.weight.detach()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (linear(x).sum() + detour.sum()).backward()


def test_other_parameters_are_refused() -> None:
    model, optimizer = make()
    with pytest.raises(ConfigError, match=r"group 0 holds a tensor of shape \(61, 96\)"):
        release_gradients(make_model(), optimizer)
    backward(model, 0)
    assert live_gradients(optimizer) == 7  # nothing has been hooked


def test_where_there_is_nothing_to_release() -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigError, match="takes the MicroAdam itself, and this is .*AdamW"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the optimizer requires a gradient"):
        release_gradients(model, MicroAdam(model.named_parameters()))


def test_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(64, 128, sparse=True)
    optimizer = MicroAdam(embedding.parameters())
    release_gradients(embedding, optimizer)
    with pytest.raises(UnsupportedLayoutError, match="sparse gradient"):
        embedding(torch.arange(5)).sum().backward()


def test_tied_weight_is_updated_once() -> None:
    """Its gradient is complete when both uses have been differentiated, also through a checkpointed module."""

    def run(*, release: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        embedding, head = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
        head.weight = embedding.weight
        model = nn.Sequential(embedding, nn.Linear(128, 128), nn.Tanh(), head)
        optimizer = MicroAdam(model.named_parameters(), lr=0.1)
        if release:
            release_gradients(model, optimizer)
        for step in range(4):
            hidden = checkpoint(model[:3], torch.arange(step, step + 9), use_reentrant=False)
            head(hidden).logsumexp(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return everything(optimizer)

    assert_same(run(release=True), run(release=False))


# ---------------------------------------------------------------- several ranks


def test_under_fsdp2() -> None:
    run_ranks(_under_fsdp2, 2)


def _under_fsdp2(rank: int, world_size: int) -> None:
    for dtype in DTYPES:
        check_same_as_normal_step(dtype, sharded=True)
    check_errors(sharded=True)
    _check_real_modules(rank)
    _check_accumulation()
    _check_one_device(rank)
    _check_ddp_and_fsdp1()


def _check_real_modules(rank: int) -> None:
    """A chain of modules, another batch on each rank; weights change while other modules are still to be gathered."""

    def run(*, release: bool) -> dict[str, Tensor]:
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU()) for _ in range(4)))
        for child in model:
            fully_shard(child)
        fully_shard(model)
        optimizer = MicroAdam(model.named_parameters(), lr=0.01)
        if release:
            release_gradients(model, optimizer)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(6):
            x = torch.randn(8, 96, generator=generator)
            (model(x) - x.roll(1, dims=1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return everything(optimizer)

    assert_same(run(release=True), run(release=False))


def _check_accumulation() -> None:
    """Three backward passes, the last one with gradient synchronization."""
    released, normal = make(sharded=True), make(sharded=True)
    release_gradients(*released)
    for step in range(4):
        for model, optimizer in (released, normal):
            for micro_step in range(3):
                model.set_requires_gradient_sync(micro_step == 2)
                backward(model, 3 * step + micro_step)
                assert is_released(model.embed.weight.grad) == (model is released[0] and micro_step == 2)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(everything(released[1]), everything(normal[1]))
    assert released[1].state[released[0].embed.weight]["step"] == 4


def _check_one_device(rank: int) -> None:
    """A plain parameter, whose gradient nobody has reduced yet."""
    model, optimizer = make()
    message = message_of(UnsupportedLayoutError, lambda: release_gradients(model, optimizer))
    assert "'embed.weight'" in message
    assert "fully_shard" in message
    backward(model, 0)
    assert live_gradients(optimizer) == 7


def _check_ddp_and_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, _ = make()
    ddp = DistributedDataParallel(model)
    optimizer = MicroAdam(ddp.named_parameters(), **SETTINGS)
    for each in (ddp, nn.Sequential(ddp), model):
        assert "fully_shard" in message_of(UnsupportedLayoutError, lambda each=each: release_gradients(each, optimizer))

    fsdp1 = FullyShardedDataParallel(make_model(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = MicroAdam(fsdp1.named_parameters(), **SETTINGS)
    assert "fully_shard" in message_of(UnsupportedLayoutError, lambda: release_gradients(fsdp1, optimizer))


def test_ranks_that_meet_later_and_wrappers_of_one_rank() -> None:
    run_ranks(_alone, 1)


def _alone(rank: int, world_size: int) -> None:
    """One rank needs no reduction, so FSDP2 and plain parameters work; DDP and FSDP1 are refused all the same."""
    check_same_as_normal_step(torch.float32, sharded=True)
    check_same_as_normal_step(torch.float32, sharded=False)
    model, optimizer = make()
    message_of(UnsupportedLayoutError, lambda: release_gradients(DistributedDataParallel(model), optimizer))
    # Wrapped afterwards: DDP copies gradients, which raises.
    release_gradients(model, optimizer)
    ddp = DistributedDataParallel(model)
    assert "remove()" in message_of(ConfigError, lambda: backward(ddp, 0))
