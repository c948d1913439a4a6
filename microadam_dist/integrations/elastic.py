"""Resumes a checkpoint of Trainer on another engine, or another number of ranks, than wrote it.

Trainer itself resumes where the engine is the same, and under DeepSpeed where stage and number of ranks are, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import deepspeed
from ..checkpoint.deepspeed_files import CheckpointFiles
from ..checkpoint.trainer import engine_of, read_training
from ..errors import CheckpointMismatchError
from ..optimizer import MicroAdam
from ..optimizer.training import load_training
from . import innermost


def is_foreign(trainer: Any, folder: Path) -> bool:
    """Whether Trainer cannot resume this checkpoint by itself."""
    written = engine_of(folder)
    if written != _engine(trainer) or written != "DeepSpeed":
        return written != _engine(trainer)
    stage, files = _zero_stage(trainer), CheckpointFiles.find(folder, None)
    return (files.stage, len(files.optim)) != (2 if stage == 1 else stage, trainer.args.world_size if stage else 0)


def resume(trainer: Any, folder: Path) -> str:
    """Load weights, state and learning rate; every rank calls it when Trainer has prepared model and optimizer.

    Returns:
        What was done, for the user.

    Raises:
        CheckpointMismatchError: They do not fit. Raised on every rank; model and optimizer are as they were.
    """
    optimizer = innermost(trainer.optimizer)
    if not isinstance(optimizer, MicroAdam):
        raise CheckpointMismatchError(
            f"{folder} was written by another engine or number of ranks, where only the state of MicroAdam can be "
            f"resumed, and the optimizer is {type(optimizer).__name__}. Resume with what wrote it."
        )
    ranks, read = trainer.args.world_size, functools.partial(read_training, folder)
    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        saved = deepspeed.load_training(engine, read)
        engine.global_steps = trainer.state.global_step
        engine.global_samples = engine.global_steps * engine.train_batch_size()
        here = f"ZeRO-{_zero_stage(trainer)}"
    else:
        saved = load_training(trainer.model_wrapped, optimizer, read)
        here = _engine(trainer)
    if saved.scheduler is not None:
        _load_scheduler(trainer.lr_scheduler, optimizer, saved.scheduler)
    here = "one process" if here == "DDP" and ranks == 1 else f"{here} on {ranks} rank{'s' * (ranks > 1)}"
    return f"{folder.name} was written by {saved.engine}, this is {here}: weights and state were cut again."


def _engine(trainer: Any) -> str:
    """What trains here, as `engine_of` says it."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    if trainer.is_fsdp_enabled:
        return f"FSDP{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    return "DDP"


def _zero_stage(trainer: Any) -> int:
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    return int(config.get_value("zero_optimization.stage", 0))


def _load_scheduler(scheduler: Any, optimizer: MicroAdam, saved: Mapping[str, Any]) -> None:
    """Also where there are more or fewer param groups: Trainer gives all of them the same learning rate."""
    groups = len(optimizer.param_groups)
    each = ("base_lrs", "_last_lr", "lr_lambdas")
    scheduler.load_state_dict({name: value[:1] * groups if name in each else value for name, value in saved.items()})
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
