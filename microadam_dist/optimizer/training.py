"""Loads what another engine's training has saved."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoint.match import match_module, match_settings
from ..checkpoint.training import Read, SavedTraining
from ..engines.collectives import process_rank, raise_together
from ..engines.names import module_tensors
from ..errors import CheckpointMismatchError
from .microadam import MicroAdam


def load_training(model: nn.Module, optimizer: MicroAdam, read: Read) -> SavedTraining:
    """Load weights, state and settings of any engine where one process, DDP or FSDP trains; every rank calls it.

    Args:
        model: As it is trained, wrapped.
        optimizer: Of its parameters, by name.
        read: Reads what was saved. Its settings are loaded if it has as many param groups.

    Returns:
        What ``read`` has given.

    Raises:
        CheckpointMismatchError: It does not fit. Raised on every rank; model and optimizer are as they were.
    """
    layouts, shards = optimizer.sharded.layouts(), optimizer.sharded.shards()
    module = module_tensors(model)
    untrained = {name: tensor for name, tensor in module.items() if tensor not in layouts}
    with raise_together():
        saved = read(process_rank())
        if any(shard.sharding_group and not shard.is_exchanged for shard in shards.values()) and any(
            isinstance(tensor, nn.Parameter) for tensor in untrained.values()
        ):
            raise CheckpointMismatchError(
                f"{saved.origin} was written by {saved.engine}, and frozen parameters that FSDP has cut, such as "
                f"{next(iter(untrained))!r}, cannot be loaded from there. Resume with the engine that wrote it."
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in untrained.items()}
        shapes |= {name: layouts[t].spans[0].global_shape for name, t in module.items() if name not in untrained}
        match_module(module, shapes, saved.weights.shapes, saved.origin)
        states = optimizer.sharded.fitting_shards(saved.states)
        if loads_settings := len(saved.param_groups) == len(optimizer.param_groups):  # otherwise they are the user's
            match_settings(saved.param_groups, optimizer.param_groups)
    optimizer.sharded.load_shards(states)
    if loads_settings:
        optimizer.sharded.load_group_settings(saved.param_groups)
    with torch.no_grad():
        for p, shard in shards.items():
            if shard.is_exchanged:
                p.copy_(saved.weights.whole(layouts[p].spans[0].fqn))
            else:
                local = torch.empty(shard.param.numel(), dtype=shard.param.dtype)
                saved.weights.weights(layouts[p], local)
                shard.param.copy_(local.view(shard.param.shape))
        for name, tensor in untrained.items():
            if name in saved.weights.shapes:
                tensor.copy_(saved.weights.whole(name))
    return saved
