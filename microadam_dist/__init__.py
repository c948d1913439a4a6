"""MicroAdam for sharded parameters: Adam with 0.56 bytes of optimizer state per parameter."""

from . import deepspeed
from .config import MicroAdamConfig
from .errors import (
    BackendUnavailableError,
    CheckpointMismatchError,
    ConfigError,
    MicroAdamError,
    UnsupportedLayoutError,
)
from .optimizer import MicroAdam, StateBytes
from .optimizer.gradient_release import GradientRelease, release_gradients
from .optimizer.sharded_files import load_sharded, save_sharded

__version__ = "0.2.0"

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
