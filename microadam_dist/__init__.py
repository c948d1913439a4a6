"""MicroAdam for sharded parameters: Adam with 0.56 bytes of optimizer state a parameter."""

from . import deepspeed
from .config import MicroAdamConfig
from .errors import (
    BackendUnavailableError,
    CheckpointMismatchError,
    ConfigError,
    MicroAdamError,
    UnsupportedLayoutError,
)
from .gradient_release import GradientRelease, release_gradients
from .optimizer import MicroAdam
from .sharded_optimizer import StateBytes
from .sharded_state import load_sharded, save_sharded

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "CheckpointMismatchError",
    "ConfigError",
    "GradientRelease",
    "MicroAdam",
    "MicroAdamConfig",
    "MicroAdamError",
    "StateBytes",
    "UnsupportedLayoutError",
    "deepspeed",
    "load_sharded",
    "release_gradients",
    "save_sharded",
]

deepspeed.register()
