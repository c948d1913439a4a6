"""Trainer callbacks of `train.py`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

COMPLETE = "complete"


class StepTimer(TrainerCallback):
    """Seconds inside optimizer steps: without evaluation, checkpoints and start-up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        self.steps += 1


class EvaluateAtEnd(TrainerCallback):
    """Held-out loss of the final weights, whatever `eval_steps` says."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class MarkComplete(TrainerCallback):
    """Leaves a marker in a checkpoint once every rank has written its part: a run may be killed while it writes."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE).touch()


def last_complete_checkpoint(folder: Path, num_steps: int | None) -> Path | None:
    """The newest checkpoint in a run's folder that `MarkComplete` has marked and that has steps left."""
    found = {int(path.parent.name.rsplit("-")[-1]): path.parent for path in folder.glob(f"*-*/{COMPLETE}")}
    return next((found[step] for step in sorted(found, reverse=True) if has_steps_left(found[step], num_steps)), None)


def has_steps_left(checkpoint: Path, num_steps: int | None) -> bool:
    """Whether a run of ``num_steps`` (None: of as many as before) goes on after a checkpoint.

    Trainer takes one more step when it is resumed from the last one.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state["global_step"] < (num_steps or state["max_steps"])


class LossProgress(ProgressCallback):
    """Trainer's progress bar with the losses beside it, instead of a dictionary a line."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, str] = {}

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """No second bar for the evaluations."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        names = {"loss": "train", "eval_loss": "held-out"}
        self.losses |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.losses, refresh=False)
