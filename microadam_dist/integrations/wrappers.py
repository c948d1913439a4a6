"""What Accelerate, Trainer and DeepSpeed put around an optimizer."""

from __future__ import annotations

from typing import Any

from ..optimizer import MicroAdam


def find_microadam(optimizer: Any) -> MicroAdam | None:
    """The `MicroAdam` under any number of wrappers; None: there is another optimizer."""
    while not isinstance(optimizer, MicroAdam):
        if not hasattr(optimizer, "optimizer"):
            return None
        optimizer = optimizer.optimizer
    return optimizer
