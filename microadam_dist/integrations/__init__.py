"""Trainer and Accelerate."""

from __future__ import annotations

from typing import Any

from ..optimizer import MicroAdam


def innermost(optimizer: Any) -> Any:
    """The optimizer under any number of wrappers of Accelerate, Trainer and DeepSpeed."""
    while not isinstance(optimizer, MicroAdam) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
