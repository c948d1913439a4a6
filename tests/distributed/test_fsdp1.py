"""FSDP1 with ``use_orig_params=True``: the bits of one process outside cut blocks, and checkpoints for any ranks.

Real backward passes; the gradients do not depend on the weights, so that blocks no shard edge cuts stay equal for ever.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from microadam_dist import (
    CheckpointMismatchError,
    MicroAdam,
    UnsupportedLayoutError,
    load_sharded,
    save_sharded,
)
from microadam_dist.checkpoint.reshard import SourceShard
from tests.checkpoint.blocks import blocks, dense
from tests.ranks import DEVICE, rank_device, run_ranks
from tests.text import batch, held_out, tiny_llama

from .models import backward, gradients, make_model, make_optimizer, message_of, shard, train, wrap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:FSDP")

FP32, BF16 = torch.float32, torch.bfloat16
MIXED = MixedPrecision(param_dtype=BF16, reduce_dtype=FP32)
SAVED_AT, END = 7, 10  # the window has 4 slots
STEPS = 8  # why so few, and the distance of the losses: see tests/deepspeed/test_elastic_loss.py
Everything = tuple[dict[tuple[str, int, int], dict[str, Tensor]], dict[tuple[str, str, int], float]]

# Name -> sharding strategy, dtype of the weights, dtype of the gradients passed in, precision
MODES: dict[str, tuple[ShardingStrategy, torch.dtype, torch.dtype, MixedPrecision | None]] = {
    "full-fp32": (ShardingStrategy.FULL_SHARD, FP32, FP32, None),
    "full-mixed": (ShardingStrategy.FULL_SHARD, FP32, BF16, MIXED),
    "full-bf16": (ShardingStrategy.FULL_SHARD, BF16, BF16, None),
    "grad-op-fp32": (ShardingStrategy.SHARD_GRAD_OP, FP32, FP32, None),
    "grad-op-mixed": (ShardingStrategy.SHARD_GRAD_OP, FP32, BF16, MIXED),
    "no-shard-bf16": (ShardingStrategy.NO_SHARD, BF16, BF16, None),
    "hybrid-bf16": (ShardingStrategy.HYBRID_SHARD, BF16, BF16, None),
    "hybrid-zero2-mixed": (ShardingStrategy._HYBRID_SHARD_ZERO2, FP32, BF16, MIXED),
}


def make(mode: str, **options: Any) -> tuple[nn.Module, MicroAdam]:
    strategy, dtype, _, precision = MODES[mode]
    if "hybrid" in mode:
        options["device_mesh"] = dist.init_device_mesh(DEVICE, (2, 2))
    model = wrap(make_model(dtype), sharding_strategy=strategy, mixed_precision=precision, **options)
    return model, make_optimizer(model)


def run(model: nn.Module, optimizer: MicroAdam, mode: str, steps: range) -> None:
    for step in steps:
        backward(model, step, MODES[mode][2])
        optimizer.step()
        optimizer.zero_grad()


def everything(optimizer: MicroAdam) -> Everything:
    """This rank's blocks and moments."""
    shards = [
        SourceShard(layout, optimizer.sharded.flat_state(p), p.detach().reshape(-1), "")
        for p, layout in optimizer.sharded.layouts().items()
        if optimizer.state.get(p)
    ]
    return {key: {n: t.clone() for n, t in block.items()} for key, block in blocks(shards).items()}, dense(shards)


def plain(mode: str, end: int) -> Everything:
    """One process, the gradients as FSDP1 reduces them."""
    return _plain(*MODES[mode][1:3], end)


@functools.cache
def _plain(dtype: torch.dtype, grad_dtype: torch.dtype, end: int) -> Everything:
    model = make_model(dtype)
    optimizer = make_optimizer(model)
    for step in range(end):
        for name, grad in gradients(step, grad_dtype).items():
            getattr(model, name).weight.grad = grad.to(rank_device(), dtype)
        optimizer.step()
    return everything(optimizer)


def assert_uncut_equal(mine: Everything, expected: Everything) -> None:
    """Whatever no shard edge cuts is as it is there, and the ranks have a lot of it."""
    uncut = mine[0].keys() & expected[0].keys()
    for key in uncut:
        for name, tensor in expected[0][key].items():
            assert torch.equal(mine[0][key][name], tensor), (key, name)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine[1], sum(key[2] for key in uncut)))
    assert {key: moment for moments, _ in everyone for key, moment in moments.items()} == expected[1]
    numel, total = sum(numel for _, numel in everyone), sum(key[2] for key in expected[0])
    assert numel >= 0.9 * total, f"only {numel} of {total} elements are in uncut blocks"


# ---------------------------------------------------------------- 2 and 4 ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By 4 ranks, and by 2."""
    folder = tmp_path_factory.mktemp("fsdp1")
    for world_size in (4, 2):
        run_ranks(_train_and_save, world_size, folder / str(world_size))
    return folder


def _train_and_save(rank: int, world_size: int, folder: Path) -> None:
    for mode in MODES:
        if "hybrid" in mode and world_size != 4:
            continue
        model, optimizer = make(mode)
        run(model, optimizer, mode, range(SAVED_AT))
        assert_uncut_equal(everything(optimizer), plain(mode, SAVED_AT))
        save_sharded(optimizer, folder / mode)
        weights = [p.detach().clone() for p in model.parameters()]
        run(model, optimizer, mode, range(SAVED_AT, END))
        expected = everything(optimizer)

        # Resumed on as many ranks: every bit, fragments included.
        model, optimizer = make(mode)
        backward(model, 99, MODES[mode][2])  # parameters become views
        optimizer.zero_grad()
        for param, weight in zip(model.parameters(), weights, strict=True):
            param.data.copy_(weight)
        load_sharded(optimizer, folder / mode)
        run(model, optimizer, mode, range(SAVED_AT, END))
        got = everything(optimizer)
        assert got[0].keys() == expected[0].keys() and got[1] == expected[1]
        for key, block in expected[0].items():
            assert all(torch.equal(got[0][key][name], tensor) for name, tensor in block.items()), key
    if world_size == 4:
        _check_framework_checkpoints(folder)
        _check_damage(folder)
        _check_refused()
        _check_rank_without_elements(rank)


def _check_framework_checkpoints(folder: Path) -> None:
    """They do not crash, and what they lose they say."""
    model, optimizer = make("full-fp32")
    fresh = get_optimizer_state_dict(model, optimizer)  # steps on zeros to see the state; that is no step
    assert {int(state["step"]) for state in optimizer.state.values()} == {0} and fresh["state"]
    run(model, optimizer, "full-fp32", range(SAVED_AT))
    before = everything(optimizer)
    for kind in (StateDictType.FULL_STATE_DICT, StateDictType.SHARDED_STATE_DICT, StateDictType.LOCAL_STATE_DICT):
        with FSDP.state_dict_type(model, kind):
            saved = FSDP.optim_state_dict(model, optimizer)
            loadable = FSDP.optim_state_dict_to_load(model, optimizer, saved)
        message = message_of(CheckpointMismatchError, lambda: optimizer.load_state_dict(loadable))  # noqa: B023
        assert "microadam_dist.load_sharded" in message, kind
    message = message_of(CheckpointMismatchError, lambda: optimizer.load_state_dict(optimizer.state_dict()))
    assert "saved under FSDP1" in message
    after = everything(optimizer)
    assert all(torch.equal(before[0][key]["weights"], block["weights"]) for key, block in after[0].items())

    # After the state itself they are welcome: learning rates come with them. Not after another step.
    optimizer.param_groups[0]["lr"] = 0.5
    load_sharded(optimizer, folder / "full-fp32")
    assert optimizer.param_groups[0]["lr"] == 1e-2
    loadable["param_groups"][0]["lr"] = 0.25
    seen: list[Any] = []
    handle = optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.param_groups[0]["lr"]))
    optimizer.load_state_dict(loadable)
    assert optimizer.param_groups[0]["lr"] == 0.25 and seen == [0.25]
    handle.remove()
    run(model, optimizer, "full-fp32", range(SAVED_AT, SAVED_AT + 1))
    message_of(CheckpointMismatchError, lambda: optimizer.load_state_dict(loadable))


def _check_damage(folder: Path) -> None:
    """A failed load names what is wrong on every rank, and leaves the optimizer as it was."""
    model, optimizer = make("full-bf16")
    run(model, optimizer, "full-bf16", range(3))
    before = everything(optimizer)
    message = message_of(CheckpointMismatchError, lambda: load_sharded(optimizer, folder / "nothing-there"))
    assert "nothing-there is no folder that save_sharded or torch.distributed.checkpoint has written" in message
    unnamed = MicroAdam(model.parameters())
    message = message_of(CheckpointMismatchError, lambda: load_sharded(unnamed, folder / "full-bf16"))
    assert "model.named_parameters()" in message and not unnamed.state
    other = MicroAdam(model.named_parameters(), window_size=3)
    message = message_of(CheckpointMismatchError, lambda: load_sharded(other, folder / "full-bf16"))
    assert "window_size=4" in message and not other.state
    after = everything(optimizer)
    for key, block in before[0].items():
        assert all(torch.equal(after[0][key][name], tensor) for name, tensor in block.items()), key


def _check_refused() -> None:
    model = wrap(make_model(), use_orig_params=False)
    optimizer = MicroAdam(model.parameters())
    backward(model, 0)
    assert "use_orig_params=True" in message_of(UnsupportedLayoutError, optimizer.step)

    inner = make_model()
    inner.conv.weight.data = inner.conv.weight.data.to(memory_format=torch.channels_last)
    model = wrap(inner)
    optimizer = MicroAdam(model.named_parameters())
    backward(model, 0)
    assert "'conv.weight'" in message_of(UnsupportedLayoutError, optimizer.step) and not optimizer.state

    model, _ = make("full-fp32")
    sharing = MicroAdam(model.named_parameters(), shard_state=True)
    backward(model, 0)
    assert "remove shard_state" in message_of(UnsupportedLayoutError, sharing.step)


def _check_rank_without_elements(rank: int) -> None:
    """The ranks agree that the first call is a step, though one of them has nothing to step."""
    model = FSDP(nn.Linear(2, 1, bias=False), use_orig_params=True, device_id=rank_device())
    optimizer = MicroAdam(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    assert (sum(p.numel() for p in model.parameters()) == 0) == (rank >= 2)
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [1] * (rank < 2)


# ---------------------------------------------------------------- GradScaler


def test_ranks_agree_about_an_overflow_and_clip() -> None:
    run_ranks(_scale_and_clip, 2)


def _scale_and_clip(rank: int, world_size: int) -> None:
    model, optimizer = make("full-fp32")
    plain_model, plain_optimizer = make("full-fp32")
    scaler = ShardedGradScaler(device=DEVICE, init_scale=1024.0)
    for step in range(4):
        grads = gradients(step)
        if step == 1:  # overflows in the shard of rank 1 only
            grads["thin"][-1, -1] = 1e38
        scaler.scale(model(grads)).backward()
        scaler.unscale_(optimizer)
        norm = model.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert {int(state["step"]) for state in optimizer.state.values()} == {step + (step < 1)}
        assert scaler.get_scale() == (1024.0 if step < 1 else 512.0)
        if step != 1:
            backward(plain_model, step)
            assert plain_model.clip_grad_norm_(1.0) == norm > 1
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    (got, moments), (expected, expected_moments) = everything(optimizer), everything(plain_optimizer)
    assert got.keys() == expected.keys() and moments == expected_moments
    for key, block in expected.items():
        assert all(torch.equal(got[key][name], tensor) for name, tensor in block.items()), key


# ---------------------------------------------------------------- other numbers of ranks, other engines


@pytest.mark.parametrize("mode", [mode for mode in MODES if "hybrid" not in mode])
@pytest.mark.parametrize("written_by", [4, 2])
def test_one_process_loads_the_state(mode: str, written_by: int, saved: Path) -> None:
    model = make_model(MODES[mode][1])
    optimizer = make_optimizer(model)
    load_sharded(optimizer, saved / str(written_by) / mode)
    whole, moments = everything(optimizer)
    expected_blocks, expected_moments = plain(mode, SAVED_AT)
    assert whole.keys() == expected_blocks.keys() and moments == expected_moments
    differing = [key for key, block in expected_blocks.items() if not _same_state(whole[key], block)]
    # A module's flat parameter is cut between ranks, in one block at each place.
    assert len(differing) <= 3 * (written_by - 1)
    assert (len(differing) > 0) == (mode != "no-shard-bf16")


def _same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(got[name], tensor) for name, tensor in expected.items() if name != "weights")


@pytest.mark.parametrize("world_size", [2, 3])
def test_other_ranks_and_fsdp2_load_the_state(world_size: int, saved: Path) -> None:
    run_ranks(_load_elsewhere, world_size, saved)


def _load_elsewhere(rank: int, world_size: int, saved: Path) -> None:
    for mode in ("full-fp32", "full-bf16"):
        expected, _ = plain(mode, SAVED_AT)
        for written_by, engine in ((4, "fsdp1"), (2, "fsdp1"), (4, "fsdp2"), (2, "ddp")):
            if engine == "fsdp1":
                model, optimizer = make(mode)
                backward(model, 0, MODES[mode][2])
            else:
                model = make_model(MODES[mode][1])
                sharded = shard(model) if engine == "fsdp2" else model
                optimizer = make_optimizer(sharded, **({"shard_state": True} if engine == "ddp" else {}))
            load_sharded(optimizer, saved / str(written_by) / mode)
            steps = {int(state["step"]) for state in optimizer.state.values()}
            assert steps == {SAVED_AT}, (engine, steps)
            shards = [
                SourceShard(layout, optimizer.sharded.flat_state(p), torch.empty(layout.spans[0].numel), "")
                for p, layout in optimizer.sharded.layouts().items()
            ]
            got = blocks(shards)
            whole = got.keys() & expected.keys()
            counts = torch.tensor([len(whole), sum(_same_state(got[key], expected[key]) for key in whole)])
            dist.all_reduce(counts)
            num_whole, num_same = counts.tolist()
            assert num_whole - 3 * (written_by - 1) <= num_same and num_same > 0.9 * len(expected)
            if engine != "fsdp1":
                train(model, optimizer, range(SAVED_AT, SAVED_AT + 2))  # all ranks can go on


def test_heldout_loss_after_4_to_2_ranks(tmp_path: Path) -> None:
    before = run_ranks(_train_llama, 4, tmp_path, 0, STEPS, True)[0]
    resumed = run_ranks(_train_llama, 2, tmp_path, STEPS, 3 * STEPS, False)[0]
    straight = run_ranks(_train_llama, 4, tmp_path / "unused", 0, 3 * STEPS, False)[0]
    print(f"held-out: {before:.4f} after {STEPS} steps, {straight:.4f} after {3 * STEPS}, {resumed:.4f} on 4, then 2")
    assert straight < before - 0.1
    assert abs(resumed - straight) < 0.01


def _train_llama(rank: int, world_size: int, folder: Path, first: int, last: int, is_saved: bool) -> float:
    """Held-out loss; starts from what is in the folder unless ``first`` is 0."""
    model = tiny_llama()
    unit = type(model.model.layers[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={unit})
    if first:
        model.load_state_dict(torch.load(folder / "weights.pt"))
    model = FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=rank_device())
    optimizer = MicroAdam(model.named_parameters(), lr=4e-3, window_size=2, density=0.05)
    if first:
        load_sharded(optimizer, folder / "optimizer")
    for step in range(first, last):
        mine = batch(step)[rank::world_size]
        model(input_ids=mine, labels=mine).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if is_saved:
        save_sharded(optimizer, folder / "optimizer")
        with FSDP.summon_full_params(model, writeback=False):
            if rank == 0:
                torch.save(model.module.state_dict(), folder / "weights.pt")
    with torch.no_grad():
        return float(model(input_ids=held_out(), labels=held_out()).loss)
