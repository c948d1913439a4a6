"""FSDP2: the bits of one process on any number of ranks, and checkpoints that go from any of them to any other.

Gradients are injected, so what is compared is the optimizer: weights and state of 1, 2, 3 and 4 ranks, of HSDP and of
a plain process are equal bit for bit.
"""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from microadam_dist import CheckpointMismatchError, MicroAdam, UnsupportedLayoutError
from tests.ranks import DEVICE, rank_device, run_ranks

from .checkpoints import DTYPES, SAVED_AT, Expected, check_loading, make, save
from .models import (
    SETTINGS,
    SHAPES,
    assert_same,
    backward,
    everything,
    gradients,
    inject,
    make_model,
    make_optimizer,
    message_of,
    shard,
    train,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# ---------------------------------------------------------------- 4 ranks


@pytest.fixture(scope="module")
def saved_by_four(tmp_path_factory: pytest.TempPathFactory, expected: Expected) -> Path:
    """Trains on 4 ranks, checks a number of things there, and leaves checkpoints behind."""
    folder = tmp_path_factory.mktemp("four")
    for dtype in DTYPES:
        (folder / str(dtype)).mkdir()
    run_ranks(_four_ranks, 4, folder, expected)
    return folder


def _four_ranks(rank: int, world_size: int, folder: Path, expected: Expected) -> None:
    for dtype in DTYPES:
        model, optimizer = make(dtype)
        train(model, optimizer, range(SAVED_AT))
        assert_same(everything(optimizer), expected[dtype, SAVED_AT])
        save(folder / str(dtype), model, optimizer, in_background=dtype == torch.bfloat16)
    _check_state_tensors(model, optimizer)
    _check_state_bytes(optimizer, expected[torch.bfloat16, SAVED_AT])
    _check_refused_state(model, optimizer, expected[torch.bfloat16, SAVED_AT])
    _check_hsdp(folder, expected)
    _check_placements()
    _check_first_step(rank)
    _check_first_step_of_zeros()
    _check_swapped_parameters(expected)


def _check_state_tensors(model: nn.Module, optimizer: MicroAdam) -> None:
    for param in model.parameters():
        state = optimizer.state[param]
        assert state["step"].shape == ()
        assert type(state["step"]) is Tensor
        for name in state.keys() - {"step"}:
            assert state[name].placements == param.placements
            assert state[name].device_mesh == param.device_mesh
            assert len(state[name]) == len(param)
            assert len(state[name].to_local()) == len(param.to_local())
    assert optimizer.state[model.few.weight]["codes"].to_local().shape[0] == (dist.get_rank() < 3)


def _check_state_bytes(optimizer: MicroAdam, expected: dict[str, Tensor]) -> None:
    """Counts what this rank holds."""
    mine = torch.tensor(optimizer.state_bytes())
    dist.all_reduce(mine)
    sparse = sum(t.nbytes for name, t in expected.items() if name.split(".")[-1] not in ("weight", "step"))
    dense = sum(t.nbytes for name, t in expected.items() if ".exp_avg" in name)
    numel = sum(t.numel() for name, t in expected.items() if name.endswith("weight"))
    assert mine.tolist() == [numel - dense // 8, sparse - dense, dense // 8, dense]


def _check_refused_state(model: nn.Module, optimizer: MicroAdam, expected: dict[str, Tensor]) -> None:
    """State of another sharding raises and changes nothing."""
    plain_model, plain = make(torch.bfloat16, mesh=None)
    train(plain_model, plain, range(1))
    message = message_of(CheckpointMismatchError, lambda: optimizer.load_state_dict(plain.state_dict()))
    assert "(61, 48)" in message
    message = message_of(CheckpointMismatchError, lambda: plain.load_state_dict(optimizer.state_dict()))
    assert "Shard(dim=0)" in message
    assert "'embed.weight'" in message
    assert_same(everything(optimizer), expected)


def _check_hsdp(folder: Path, expected: Expected) -> None:
    mesh = dist.init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("replicate", "shard"))
    for dtype in DTYPES:
        model, optimizer = make(dtype, mesh=mesh)
        train(model, optimizer, range(SAVED_AT))
        assert_same(everything(optimizer), expected[dtype, SAVED_AT])
        for param in model.parameters():  # replicas are equal
            for tensor in [param, *optimizer.state[param].values()]:
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                both = [torch.empty_like(local) for _ in range(2)]
                dist.all_gather(both, local.contiguous(), group=mesh["replicate"].get_group())
                assert torch.equal(*both)
    check_loading(folder / str(dtype), dtype, expected, mesh=mesh)


def _check_placements() -> None:
    """Refused with the parameter's name, its placements and a remedy, before anything exists."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("dp", "tp"))

    def refused(model: nn.Module, *expected: str) -> None:
        optimizer = MicroAdam(model.named_parameters(), **SETTINGS)
        weights = [whole(p) for p in model.parameters()]
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        message = message_of(UnsupportedLayoutError, optimizer.step)
        assert all(part in message for part in expected), message
        assert not optimizer.state
        assert all(torch.equal(whole(p), w) for p, w in zip(model.parameters(), weights, strict=True))

    refused(
        shard(nn.Linear(128, 64), shard_placement_fn=lambda param: Shard(param.ndim - 1)),
        "'weight'",
        "Shard(dim=1)",
        "shard_placement_fn",
    )
    for plan, placement in ((ColwiseParallel(), "_StridedShard"), (RowwiseParallel(), "Shard(dim=1)")):
        model = parallelize_module(nn.Linear(128, 64, bias=False), mesh["tp"], plan)
        refused(shard(model, mesh=mesh["dp"]), "'weight'", placement, "without tensor parallelism")

    model = nn.Linear(128, 64)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0), Shard(0)]))
    refused(model, "'weight'", "(Shard(dim=0), Shard(dim=0))")
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(64, 128), mesh, [Replicate(), Partial()]))
    refused(model, "'weight'", "Partial(sum)")

    # A parameter that is whole on every rank is whole; its gradient must be, too.
    model.weight = nn.Parameter(DTensor.from_local(torch.ones(64, 128), mesh, [Replicate(), Replicate()]))
    optimizer = MicroAdam(model.named_parameters())
    model.weight.grad = DTensor.from_local(torch.ones(64, 128), mesh, [Replicate(), Partial()])
    message = message_of(UnsupportedLayoutError, optimizer.step)
    assert "gradient of parameter 'weight'" in message
    assert not optimizer.state
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert optimizer.state[model.weight]["codes"].shape == (64, 64)


def _check_first_step(rank: int) -> None:
    """A rank with nothing but zeros, or with nothing at all, takes the first step with the others."""
    plain, sharded = (make_model(shapes={"few": SHAPES["few"]}) for _ in range(2))
    shard(sharded)
    optimizers = [make_optimizer(model) for model in (plain, sharded)]
    for model, optimizer in zip((plain, sharded), optimizers, strict=True):
        inject(model, 0)  # only the first row is not zero
        assert model is plain or bool(model.few.weight.grad.to_local().any()) == (rank == 0)
        optimizer.step()
        assert optimizer.state[model.few.weight]["step"] == 1
    assert_same(everything(optimizers[1]), everything(optimizers[0]))


def _check_first_step_of_zeros() -> None:
    """`get_optimizer_state_dict` steps on zeros to see the state; that is no step."""
    model, optimizer = make(torch.float32)
    weights = [whole(p) for p in model.parameters()]
    saved = get_optimizer_state_dict(model, optimizer)
    assert {int(state["step"]) for state in saved["state"].values()} == {0}
    assert all(torch.equal(whole(p), w) for p, w in zip(model.parameters(), weights, strict=True))
    assert optimizer.state_dict()["microadam"]["tensors"][0]["spans"][0] == ("embed.weight", (61, 96), 0, 61 * 96, 0)


def _check_swapped_parameters(expected: Expected) -> None:
    """What Accelerate does: construct, put placeholders into the groups, shard, put the shards there."""
    model = make_model(torch.bfloat16)
    optimizer = make_optimizer(model)
    assert optimizer.state_dict()["state"] == {}
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1) for _ in group["params"]]
    constructed = optimizer.names.groups[0][0]
    shard(model)
    gc.collect()
    assert constructed.param is None  # the unsharded weights can go
    sharded = list(model.parameters())
    for group, params in zip(optimizer.param_groups, (sharded[:2], sharded[2:3], sharded[3:]), strict=True):
        group["params"] = params
    train(model, optimizer, range(SAVED_AT))
    assert_same(everything(optimizer), expected[torch.bfloat16, SAVED_AT])
    spans = [tensor["spans"][0] for tensor in optimizer.state_dict()["microadam"]["tensors"].values()]
    assert [fqn for fqn, *_ in spans] == [f"{name}.weight" for name in SHAPES]

    optimizer = MicroAdam(make_model().parameters())
    optimizer.param_groups[0]["params"] = sharded[::-1]
    inject(model, 0)
    assert "not the parameter MicroAdam was constructed with" in message_of(UnsupportedLayoutError, optimizer.step)


# ---------------------------------------------------------------- other numbers of ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_other_ranks_have_the_same_bits_and_load_the_checkpoint(
    world_size: int, expected: Expected, saved_by_four: Path, saved_by_one: Path
) -> None:
    run_ranks(_other_ranks, world_size, expected, saved_by_four, saved_by_one)


def _other_ranks(rank: int, world_size: int, expected: Expected, by_four: Path, by_one: Path) -> None:
    for dtype in DTYPES:
        model, optimizer = make(dtype)
        train(model, optimizer, range(SAVED_AT))
        assert_same(everything(optimizer), expected[dtype, SAVED_AT])
        check_loading(by_four / str(dtype), dtype, expected)
    check_loading(by_one, torch.bfloat16, expected)
    _check_mixed_precision(world_size)
    _check_grad_scaler(rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_process_loads_the_checkpoint(dtype: torch.dtype, expected: Expected, saved_by_four: Path) -> None:
    check_loading(saved_by_four / str(dtype), dtype, expected, mesh=None)


def _check_mixed_precision(world_size: int) -> None:
    """Real backward passes: bf16 compute, fp32 reduction and fp32 weights, hence the state and bits of fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer = make(torch.float32, mp_policy=policy)
    plain, plain_optimizer = make(torch.float32, mesh=None)
    for step in range(8):
        backward(model, step, torch.bfloat16)
        for name, grad in gradients(step, torch.bfloat16).items():
            exact = getattr(plain, name).weight.grad = grad.to(rank_device(), torch.float32)
            assert torch.equal(getattr(model, name).weight.grad.full_tensor(), exact), name
        optimizer.step()
        optimizer.zero_grad()
        plain_optimizer.step()
    assert_same(everything(optimizer), everything(plain_optimizer))


def _check_grad_scaler(rank: int) -> None:
    """An overflow on one rank skips the step, be it the first one, on all ranks."""
    runs = []
    for mesh_option in ({}, {"mesh": None}):
        model, optimizer = make(torch.float32, **mesh_option)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
        for step in range(6):
            inject(model, step)
            for param in model.parameters():
                param.grad *= scaler.get_scale()
            if step in (0, 3):
                local = getattr(model.few.weight.grad, "_local_tensor", model.few.weight.grad)
                local.view(-1)[5:6] = torch.inf if rank == 0 or mesh_option else 0.0
            scaler.scale(torch.zeros((), device=rank_device()))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.state[model.few.weight]["step"] == 4
        runs.append({"scale": torch.tensor(scaler.get_scale()), **everything(optimizer)})
    assert_same(*runs)
