"""MicroAdam as a `torch.optim.Optimizer`, whatever shards its parameters."""

from .microadam import MicroAdam
from .sharded_state import StateBytes

__all__ = ["MicroAdam", "StateBytes"]
