"""Hugging Face Trainer: MicroAdam's metrics in its logs (TensorBoard, W&B, ... as ``report_to`` says)."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..diagnostics.report import PREFIX
from ..errors import ConfigError
from ..optimizer import MicroAdam
from . import innermost


class MetricsCallback(TrainerCallback):
    """Logs ``optimizer.metrics`` under ``microadam/`` in every step that `MicroAdam` has measured.

        trainer = Trainer(..., optimizer_cls_and_kwargs=(MicroAdam, {"lr": 6e-5, "metrics_every": 50}))
        trainer.add_callback(MetricsCallback(trainer))

    With DeepSpeed ``metrics_every`` is one of the optimizer's ``params`` in the JSON. The numbers are in the
    ``log_history`` of ``trainer_state.json``, too, from which ``microadam report`` draws them.

    Args:
        trainer: Callbacks cannot log by themselves.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._logged: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise a ConfigError if there is nothing to log."""
        if not self._optimizer().metrics_every:
            raise ConfigError("MetricsCallback needs MicroAdam(..., metrics_every=N) with N > 0, for example 50.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log what is new."""
        metrics = self._optimizer().metrics
        if metrics is self._logged or not metrics:
            return
        self._logged = metrics
        should_log = control.should_log  # Trainer's own log of this step, which a log takes back
        self._trainer.log({PREFIX + name: value for name, value in metrics.items()})
        control.should_log = should_log

    def _optimizer(self) -> MicroAdam:
        optimizer = innermost(self._trainer.optimizer)
        if not isinstance(optimizer, MicroAdam):
            raise ConfigError(f"MetricsCallback logs the metrics of MicroAdam; the optimizer is {type(optimizer)}.")
        return optimizer
