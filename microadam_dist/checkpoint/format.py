"""The schema: what a state dict says about the tensors in it, beside torch's "state" and "param_groups".

    {"format": 1, "world_size": W, "rank": r, "tensors": {index: {
        "spans": [(fqn, global_shape, start, numel, offset), ...],
        "settings": {"window_size": ..., "density": ..., "block_size": ..., "bucket_size": ..., "ef_bits": ...}}}}

With it, a tensor's state can be cut by (parameter, global offset) without the model or the engine that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import LATER_SETTINGS, STRUCTURAL_SETTINGS, MicroAdamConfig
from ..errors import CheckpointMismatchError, MicroAdamError
from ..layout import ShardSpan, StateLayout, plain_fqn

# The entry's key in a state dict.
LAYOUT_KEY = "microadam"
FORMAT = 1

# What stands for the state of a parameter in a state dict without room for it, and what it says there.
APART_KEY = "microadam_state"
APART = "saved by microadam_dist.save_sharded"


def describe_layouts(layouts: Mapping[int, StateLayout], rank: int, world_size: int) -> dict[str, Any]:
    """The entry for these local tensors, by their position in the param groups; plain ints, strings and lists."""
    tensors = {
        index: {
            "spans": [(s.fqn, s.global_shape, s.start, s.numel, s.offset) for s in layout.spans],
            "settings": layout.config.structural,
        }
        for index, layout in layouts.items()
    }
    return {"format": FORMAT, "world_size": world_size, "rank": rank, "tensors": tensors}


def read_layouts(entry: Mapping[str, Any]) -> dict[int, StateLayout]:
    """The layouts an entry describes.

    Raises:
        CheckpointMismatchError: The entry has another format version, or is not one.
    """
    found = entry.get("format") if isinstance(entry, Mapping) else entry
    if found != FORMAT:
        raise CheckpointMismatchError(
            f"the checkpoint's MicroAdam state has format {found!r}, this version reads {FORMAT}. "
            "Load it with the version of microadam_dist that wrote it."
        )
    try:
        return {
            int(index): StateLayout(
                tuple(ShardSpan(plain_fqn(fqn), tuple(shape), *interval) for fqn, shape, *interval in tensor["spans"]),
                read_settings(tensor["settings"]),
            )
            for index, tensor in entry["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, MicroAdamError) as error:
        raise CheckpointMismatchError(
            f"the description of MicroAdam state in the checkpoint is damaged: {error!r}. Copy it again, or load an "
            "earlier one."
        ) from error


def read_settings(settings: Mapping[str, Any]) -> MicroAdamConfig:
    """The structural settings that a description has; those that its version did not know as they were then.

    Raises:
        ConfigError: One is invalid.
        KeyError: One is missing.
    """
    saved = {**LATER_SETTINGS, **settings}
    return MicroAdamConfig.from_dict({name: saved[name] for name in STRUCTURAL_SETTINGS})
