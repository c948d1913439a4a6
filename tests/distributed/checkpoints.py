"""Checkpoints in every form `torch.distributed.checkpoint` has, and what a plain process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from microadam_dist import MicroAdam

from .models import assert_same, everything, make_model, make_optimizer, shard, train

DTYPES = [torch.float32, torch.bfloat16]
SAVED_AT, END = 10, 16  # the window has 4 slots
Expected = dict[tuple[torch.dtype, int], dict[str, Tensor]]


def make(dtype: torch.dtype, seed: int = 0, exchange: str | None = None, **kwargs: Any) -> tuple[nn.Module, MicroAdam]:
    """A model and its optimizer, sharded by FSDP2.

    ``mesh=None`` for a plain one, ``exchange`` for a plain one whose state is sharded over all ranks.
    """
    model = make_model(dtype, seed)
    if exchange is not None:
        return model, make_optimizer(model, shard_state=True, weight_exchange=exchange)
    if "mesh" not in kwargs or kwargs["mesh"] is not None:
        model = shard(model, **kwargs)
    return model, make_optimizer(model)


def steps_of_one_process() -> Expected:
    """Everything after `SAVED_AT` and `END` steps of one plain process."""
    results = {}
    for dtype in DTYPES:
        model, optimizer = make(dtype, mesh=None)
        for start, end in ((0, SAVED_AT), (SAVED_AT, END)):
            train(model, optimizer, range(start, end))
            results[dtype, end] = everything(optimizer)
    return results


SHARDED = StateDictOptions()
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True)
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def state_dicts(model: nn.Module, optimizer: MicroAdam, options: StateDictOptions = SHARDED) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_state_dicts(
    model: nn.Module, optimizer: MicroAdam, saved: dict[str, Any], options: StateDictOptions = SHARDED
) -> None:
    set_model_state_dict(model, saved["model"], options=options)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


def save(folder: Path, model: nn.Module, optimizer: MicroAdam, *, in_background: bool = False) -> None:
    """The two forms `torch.distributed.checkpoint` can reshard, and the full one in a file of its own."""
    sharded = state_dicts(model, optimizer)
    if in_background:
        dcp.async_save(sharded, checkpoint_id=folder / "sharded").result()
    else:
        dcp.save(sharded, checkpoint_id=folder / "sharded")
    dcp.save(state_dicts(model, optimizer, FLAT), checkpoint_id=folder / "flat")
    raw = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(raw, checkpoint_id=folder / "raw")
    full = state_dicts(model, optimizer, FULL_ON_CPU)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")


def load(folder: Path, model: nn.Module, optimizer: MicroAdam, options: StateDictOptions) -> None:
    """Load the form that belongs to the options."""
    if options.full_state_dict:
        is_source = not options.broadcast_from_rank0 or dist.get_rank() == 0
        saved = torch.load(folder / "full.pt") if is_source else {"model": {}, "optimizer": {}}
    else:
        saved = state_dicts(model, optimizer, options)
        dcp.load(saved, checkpoint_id=folder / ("flat" if options.flatten_optimizer_state_dict else "sharded"))
    set_state_dicts(model, optimizer, saved, options)


def load_raw(folder: Path, model: nn.Module, optimizer: MicroAdam) -> None:
    """What the optimizer's own ``state_dict`` gives can be saved and resharded too; the state must exist."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    raw = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.load(raw, checkpoint_id=folder / "raw")
    model.load_state_dict(raw["model"])
    optimizer.load_state_dict(raw["optimizer"])


def check_loading(folder: Path, dtype: torch.dtype, expected: Expected, **kwargs: Any) -> None:
    """Whatever the form: everything is there, and more steps give what they give without the interruption."""
    options = [SHARDED, FLAT, FULL] + [BROADCAST] * dist.is_initialized()
    for option in options:
        model, optimizer = make(dtype, seed=1, **kwargs)
        load(folder, model, optimizer, option)
        assert_same(everything(optimizer), expected[dtype, SAVED_AT])
    model, optimizer = make(dtype, seed=2, **kwargs)
    load_raw(folder, model, optimizer)
    assert_same(everything(optimizer), expected[dtype, SAVED_AT])
    train(model, optimizer, range(SAVED_AT, END))
    assert_same(everything(optimizer), expected[dtype, END])
