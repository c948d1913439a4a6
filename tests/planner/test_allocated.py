"""Bytes that real engines and the optimizer allocate on each rank, and how FSDP1 cuts, against the planner.

DeepSpeed's engines: `tests/deepspeed/test_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from microadam_dist import MicroAdam, MicroAdamConfig
from microadam_dist.engines.cuts import fsdp1_shard
from microadam_dist.planner.engines import Engine, Precision
from microadam_dist.planner.shapes import Shapes
from tests.distributed.models import SETTINGS, SHAPES, backward, make_model, shard, wrap
from tests.planner.rank_memory import RankMemory, rank_memory
from tests.ranks import run_ranks

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "single": lambda model: model,
    "ddp": DistributedDataParallel,
    "ddp-sharded": DistributedDataParallel,
    "fsdp1": wrap,
    "fsdp2": shard,
}
# The units of `shard`: two children of their own and the others together.
NAMES = [f"{name}.weight" for name in SHAPES]
ALL: Shapes = dict(zip(NAMES, SHAPES.values(), strict=True))
UNITS: list[Shapes] = [{name: ALL[name] for name in unit} for unit in (NAMES[2:], NAMES[:1], NAMES[1:2])]


ENGINES = [("single", 1), ("ddp", 2), ("ddp-sharded", 3), ("fsdp1", 2), ("fsdp1", 3), ("fsdp2", 2), ("fsdp2", 3)]


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [_local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _allocated(rank: int, world_size: int, engine: str, dtype: torch.dtype) -> RankMemory:
    model = make_model(dtype)
    wrapped = WRAPPERS[engine](model)
    optimizer = MicroAdam(wrapped.named_parameters(), **SETTINGS, shard_state=engine == "ddp-sharded")
    backward(wrapped, 1, dtype)
    params = list(wrapped.parameters())
    optimizer.step()
    state = optimizer.state_bytes()
    return RankMemory(
        weights=_storage_bytes(params),
        gradients=_storage_bytes(p.grad for p in params if p.grad is not None),
        master=0,
        optimizer=state.sparse_bytes + state.dense_bytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "pure-bf16"])
@pytest.mark.parametrize(("engine", "world_size"), ENGINES)
def test_allocated_bytes_are_the_planned_ones(engine: str, world_size: int, dtype: torch.dtype) -> None:
    precision = Precision(weight=dtype.itemsize, master=0, compute=dtype.itemsize)
    config = MicroAdamConfig(**SETTINGS)
    for rank, got in enumerate(run_ranks(_allocated, world_size, engine, dtype)):
        assert got == rank_memory(Engine(engine), UNITS, config, world_size, rank, precision), f"rank {rank}"


def _fsdp1_intervals(rank: int, world_size: int) -> dict[torch.dtype, Any]:
    """Dtype -> for each unit its parameters' (name, start, length) here, and the length of the flat shard."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    found: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        kwargs: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
        for name in list(SHAPES)[:2]:
            setattr(model, name, FSDP(getattr(model, name), **kwargs))
        root = FSDP(model, **kwargs)
        found[dtype] = []
        for module in (root, *(getattr(model, name) for name in list(SHAPES)[:2])):
            flat = module._handle.flat_param
            infos = zip(flat._fqns, flat._shard_param_infos, strict=True)
            held = [(fqn, i.intra_param_start_idx, i.numel_in_shard) for fqn, i in infos if i.in_shard]
            found[dtype].append((held, flat.numel()))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_cuts_where_planned(world_size: int) -> None:
    for rank, found in enumerate(run_ranks(_fsdp1_intervals, world_size)):
        for dtype, units in found.items():
            for shapes, (held, num_elements) in zip(UNITS, units, strict=True):
                planned = fsdp1_shard(shapes, world_size, rank, alignment=16 // dtype.itemsize)
                spans = [(span.fqn, span.start, span.numel) for span in planned.spans]
                if len(shapes) == 1:  # named inside its own module
                    spans = [("weight", *span[1:]) for span in spans]
                assert (spans, planned.numel) == (held, num_elements), f"rank {rank}, {dtype}"
