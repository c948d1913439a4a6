"""The optimizer's state in checkpoints of Trainer and Accelerate where theirs have no place for it.

Under FSDP1, and under DDP with ``shard_state``, they save the state dict of one rank, or one without room for the state
(`MicroAdam.is_saved_apart`). These put it into files of its own, for any number of ranks:

    class MyTrainer(ShardedStateMixin, Trainer): ...

    keep_sharded_state(accelerator)     # once, after accelerator.prepare(model, optimizer)
    accelerator.save_state(folder)
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..checkpoint.trainer import STATE_FOLDER
from ..errors import CheckpointMismatchError
from ..optimizer import MicroAdam
from ..optimizer.sharded_files import load_sharded, save_sharded
from . import elastic, innermost

logger = logging.getLogger(__name__)


class ShardedStateMixin:
    """For a subclass of `transformers.Trainer`: saves what Trainer has no place for, and resumes on any engine.

    A checkpoint that another engine wrote, or DeepSpeed on another number of ranks or at another stage, is loaded by
    (parameter, interval): see `elastic`. Data go on after as many steps, so a step should have as many samples.
    """

    optimizer: Any
    model: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with parameters that are called as in the model instead of by their positions."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if isinstance(microadam := innermost(self.optimizer), MicroAdam) and microadam.names.sharded is None:
            microadam.names.take_from(args[0] if args else self.model)
        return optimizer

    def report_elastic(self, message: str) -> None:
        """Called on every rank when a checkpoint of another engine or number of ranks was loaded."""
        logger.warning(message)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepare = super()._prepare_for_training  # type: ignore[misc]
        if resume_from_checkpoint is None or not elastic.is_foreign(self, Path(resume_from_checkpoint)):
            return prepare(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = prepare(max_steps, train_dataloader, None)
        self.report_elastic(elastic.resume(self, Path(resume_from_checkpoint)))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not elastic.is_foreign(self, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        _save(self.optimizer, Path(output_dir, STATE_FOLDER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _load(self.optimizer, Path(checkpoint, STATE_FOLDER))
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def keep_sharded_state(accelerator: Any) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` keep the state of its optimizers.

    Args:
        accelerator: An `accelerate.Accelerator` that has prepared model and optimizers.

    Raises:
        CheckpointMismatchError: From ``load_state``, when the checkpoint was saved without it.
    """

    def save(models: Any, weights: Any, output_dir: str) -> None:
        for index, optimizer in enumerate(accelerator._optimizers):
            _save(optimizer, Path(output_dir, f"{STATE_FOLDER}_{index}"))

    def load(models: Any, input_dir: str) -> None:
        for index, optimizer in enumerate(accelerator._optimizers):
            folder = Path(input_dir, f"{STATE_FOLDER}_{index}")
            microadam = innermost(optimizer)
            if isinstance(microadam, MicroAdam) and microadam.is_saved_apart and not folder.is_dir():
                raise CheckpointMismatchError(
                    f"{folder} is not there: the checkpoint was saved without keep_sharded_state(accelerator), and "
                    "what Accelerate saves has no place for the state of MicroAdam. Start with its weights only."
                )
            _load(optimizer, folder)

    for optimizer in accelerator._optimizers:
        if isinstance(microadam := innermost(optimizer), MicroAdam):
            microadam.sharded.loads_shards_later = (
                True  # under FSDP the hook is called after the optimizer's load_state_dict
            )
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _save(optimizer: Any, folder: Path) -> None:
    if isinstance(microadam := innermost(optimizer), MicroAdam) and microadam.is_saved_apart:
        save_sharded(microadam, folder)


def _load(optimizer: Any, folder: Path) -> None:
    if isinstance(microadam := innermost(optimizer), MicroAdam) and folder.is_dir():
        load_sharded(microadam, folder)
