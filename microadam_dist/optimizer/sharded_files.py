"""Optimizer state in files of its own, for any number of ranks: FSDP1, whose checkpoints have no room for it.

save_sharded(optimizer, "checkpoint/optimizer")   # beside the model's weights, which FSDP1 saves
load_sharded(optimizer, "checkpoint/optimizer")   # on as many ranks, or more, or fewer, or under another engine
"""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from ..checkpoint.dcp import LocalState, SavedState, write_state
from ..config import CHANGEABLE_SETTINGS, MicroAdamConfig
from ..engines.collectives import process_rank, raise_together
from ..errors import UnsupportedLayoutError
from ..layout import StateLayout
from .microadam import MicroAdam


def save_sharded(optimizer: MicroAdam, folder: str | Path) -> None:
    """Save the optimizer's state and settings with `torch.distributed.checkpoint`; every rank calls it.

    Args:
        optimizer: Of one process, DDP, FSDP1 or FSDP2; constructed with ``model.named_parameters()``, so that its
            parameters are found again by name.
        folder: New or empty, in a file system that all ranks share.

    Raises:
        UnsupportedLayoutError: The optimizer is DeepSpeed's, which saves its state itself.
    """
    tensors = [LocalState(layout, optimizer.sharded.flat_state(p)) for p, layout in _layouts(optimizer).items()]
    configs = map(MicroAdamConfig.from_dict, optimizer.param_groups)  # numbers, for the file
    groups = [{name: getattr(config, name) for name in CHANGEABLE_SETTINGS} for config in configs]
    write_state(folder, tensors, groups, process_rank()[1])


def load_sharded(optimizer: MicroAdam, folder: str | Path) -> None:
    """Load what `save_sharded` wrote on any number of ranks; every rank calls it.

    State of blocks that no shard edge cuts, on either side, is exact; see `checkpoint.reshard` for the others. On as
    many ranks as it was saved, with the same sharding, everything is.

    Args:
        optimizer: With the same parameters by name. Learning rates and other settings are loaded if it has as many
            param groups.
        folder: What was given to `save_sharded`. State there of parameters that the optimizer does not have is left
            out, with a warning.

    Raises:
        CheckpointMismatchError: The folder is damaged or belongs to another model or other settings. Raised on every
            rank; the optimizer is as it was.
    """
    with raise_together():
        saved = SavedState(folder)
        layouts = _layouts(optimizer)
        states = optimizer.sharded.fitting_shards(saved.states)
        others = saved.others(list(layouts.values()))
    if others:
        warnings.warn(
            f"{folder} also has the state of {len(others)} parameters that this optimizer does not have, such as "
            f"{', '.join(others[:3])}: it is left out. Construct the optimizer with them to go on training them.",
            stacklevel=2,
        )
    optimizer.sharded.load_shards(states)
    if len(saved.param_groups) == len(optimizer.param_groups):  # otherwise their settings are the user's
        optimizer.sharded.load_group_settings(saved.param_groups)


def _layouts(optimizer: MicroAdam) -> dict[Tensor, StateLayout]:
    layouts = optimizer.sharded.layouts()
    for layout in layouts.values():
        if len(layout.spans) != 1:
            raise UnsupportedLayoutError(
                "the optimizer's tensors hold several parameters each, as DeepSpeed makes them: use the engine's own "
                "save_checkpoint, and microadam_dist.deepspeed.load_checkpoint."
            )
    return layouts
