"""Trainer callbacks of `train.py`."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from microadam_dist import MicroAdam, release_gradients

from .errors import UserError
from .resume import COMPLETE, SETTINGS_FILE


def base_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer under the wrappers of Accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def peak_memory() -> int:
    """Peak bytes of this rank: GPU memory where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


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


class OptimizerClock:
    """Seconds between calls of `start` and `stop`; on a GPU between events, as it works behind the host."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: Any = None

    def start(self, *_: Any) -> None:
        self._start = self._now()

    def stop(self, *_: Any) -> None:
        if self._on_gpu:
            self._events.append((self._start, self._now()))
        else:
            self._seconds += self._now() - self._start

    def seconds(self) -> float:
        """All of them so far; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
            self._events.clear()
        return self._seconds

    def time_steps(self, optimizer: Optimizer) -> None:
        """Run during ``optimizer.step()``."""
        optimizer.register_step_pre_hook(self.start)
        optimizer.register_step_post_hook(self.stop)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def release_timed(model: torch.nn.Module, optimizer: MicroAdam, clock: OptimizerClock) -> None:
    """`release_gradients`, with the clock running while a weight is updated."""
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        param.register_post_accumulate_grad_hook(clock.start)
    release_gradients(model, optimizer)
    for param in params:
        param.register_post_accumulate_grad_hook(clock.stop)


class OptimizerTimer(TrainerCallback):
    """Seconds of updating weights, in `optimizer.step` or, when gradients are released, in the backward pass."""

    def __init__(self, device: torch.device, release: bool) -> None:
        self.clock = OptimizerClock(device)
        self._release = release

    def on_train_begin(self, *_: Any, model: torch.nn.Module, optimizer: Any, **__: Any) -> None:
        optimizer = base_optimizer(optimizer)
        self.clock.time_steps(optimizer)
        if self._release:
            release_timed(model, optimizer, self.clock)

    def on_log(self, *_: Any, **__: Any) -> None:
        self.clock.seconds()  # frees its events, when Trainer has waited for the GPU anyway


class EvaluateAtEnd(TrainerCallback):
    """Held-out loss of the final weights, whatever `eval_steps` says."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class MarkComplete(TrainerCallback):
    """Leaves a marker in a checkpoint once every rank has written its part: a run may be killed while it writes.

    Args:
        settings: What the run was started with, which is written beside it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (checkpoint / SETTINGS_FILE).write_text(json.dumps(self.settings, indent=1) + "\n", encoding="utf-8")
            (checkpoint / COMPLETE).touch()


class NewLearningRate(TrainerCallback):
    """Puts another peak learning rate into what was resumed, whose schedule goes on: `--override lr`."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_train_begin(self, *_: Any, lr_scheduler: Any, **__: Any) -> None:
        while hasattr(lr_scheduler, "scheduler"):  # under the wrappers of Accelerate
            lr_scheduler = lr_scheduler.scheduler
        if not hasattr(lr_scheduler, "lr_lambdas"):
            raise UserError("--override lr: the schedule is the DeepSpeed JSON's, and goes on as it was")
        groups = lr_scheduler.optimizer.param_groups
        lr_scheduler.base_lrs = [self.lr] * len(groups)
        for group, factor in zip(groups, lr_scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = self.lr, self.lr * factor(lr_scheduler.last_epoch)
        lr_scheduler._last_lr = [group["lr"] for group in groups]  # what is logged


class LossProgress(ProgressCallback):
    """Trainer's progress bar with losses, speed and peak memory beside it, instead of a dictionary per line."""

    def __init__(self, timer: StepTimer, tokens_a_step: int) -> None:
        super().__init__()
        self.timer, self.tokens_a_step = timer, tokens_a_step
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
            use = {"peak": f"{peak_memory() / 2**30:.2f} GiB"}
            if self.timer.steps:
                use["tokens/s"] = f"{self.tokens_a_step * self.timer.steps / self.timer.seconds:,.0f}"
            self.training_bar.set_postfix(self.losses | use, refresh=False)
