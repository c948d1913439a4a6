"""Whether a state dict fits an optimizer, asked before anything is changed. Every answer but yes is an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import indices_are_valid, state_specs
from ..config import SETTING_NAMES, MicroAdamConfig, structural_difference
from ..errors import CheckpointMismatchError, ConfigError
from ..layout import WINDOW_TENSORS, StateLayout

Groups = Sequence[Mapping[str, Any]]


def state_dict_parts(state_dict: Mapping[str, Any]) -> tuple[Groups, Mapping[Any, Any]]:
    """Groups and state of a state dict.

    Raises:
        CheckpointMismatchError: It is none, or has state of parameters in no group.
    """
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if (
        not isinstance(groups, Sequence)
        or not all(isinstance(group, Mapping) and "params" in group for group in groups)
        or not isinstance(state, Mapping)
    ):
        raise CheckpointMismatchError(
            f"no optimizer's state dict: it has {sorted(map(str, state_dict))}, expected 'state' and 'param_groups'. "
            "Of a whole training checkpoint, load the optimizer's part."
        )
    if unknown := set(state).difference(*(group["params"] for group in groups)):
        raise CheckpointMismatchError(
            f"the checkpoint has state of parameters that are in none of its groups ({min(map(str, unknown))}, ...). "
            "It is damaged, or keys were changed in one place only."
        )
    return groups, state


def match_groups(saved_groups: Groups, groups: Groups) -> None:
    """The saved groups must have as many parameters and the same structural settings.

    Raises:
        CheckpointMismatchError: Names the group and what differs.
    """
    saved_sizes, sizes = ([len(group["params"]) for group in side] for side in (saved_groups, groups))
    if saved_sizes != sizes:
        raise CheckpointMismatchError(
            f"the checkpoint has param groups of {saved_sizes} parameters, this optimizer of {sizes}. Build the "
            "optimizer with the same groups as when the checkpoint was written."
        )
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if missing := [name for name in SETTING_NAMES if name not in saved]:
            raise CheckpointMismatchError(
                f"param group {index} of the checkpoint has no {missing[0]!r}: it was not written by MicroAdam."
            )
        if name := structural_difference(saved, group):
            raise CheckpointMismatchError(
                f"param group {index} of the checkpoint has {name}={saved[name]}, this optimizer {group[name]}. "
                f"State cannot be converted; construct the optimizer with {name}={saved[name]}."
            )
        try:
            MicroAdamConfig.from_dict(saved)
        except ConfigError as error:
            raise CheckpointMismatchError(f"param group {index} of the checkpoint is damaged: {error}") from None


def match_spans(saved: StateLayout, layout: StateLayout, name: str) -> None:
    """State must be of the same part of the parameter; names are not compared, they depend on how it was built.

    Raises:
        CheckpointMismatchError: Names the first interval that differs.
    """
    got, expected = (
        [(span.global_shape, span.start, span.numel, span.offset) for span in side.spans] for side in (saved, layout)
    )
    if got != expected:
        pairs = zip(got, expected, strict=False)
        theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), (got, expected))
        raise CheckpointMismatchError(
            f"the checkpoint's state of parameter {name} describes another shard: (shape, start, length, offset) "
            f"{theirs}, here {ours}. It was written with another number of ranks, another sharding or for another "
            "model. Under DeepSpeed, microadam_dist.deepspeed.load_checkpoint loads it on any number of ranks."
        )


def match_names(state: Any, layout: StateLayout, name: str) -> None:
    """One parameter's state must have exactly the tensors of its layout.

    Raises:
        CheckpointMismatchError: Names what is there and what is expected.
    """
    expected = {"step", *layout.tensors}
    if not isinstance(state, Mapping) or set(state) != expected:
        found = sorted(state) if isinstance(state, Mapping) else [repr(state)]
        raise CheckpointMismatchError(
            f"the checkpoint's state of parameter {name} has {found}, expected {sorted(expected)}. "
            "It was written by another optimizer or for a parameter of another shape."
        )


def match_tensors(state: Mapping[str, Any], layout: StateLayout, name: str) -> None:
    """This rank's part of one parameter's state must have the dtypes and shapes of its layout, and valid contents.

    Raises:
        CheckpointMismatchError: Names the tensor, what it is and what is expected.
    """
    specs = {key: (dtype, layout.shapes[key]) for key, (dtype, _) in state_specs(layout).items()}
    for key, (dtype, shape) in {"step": (torch.int64, ()), **specs}.items():
        got = state[key]
        if not isinstance(got, Tensor) or got.is_meta or got.dtype != dtype or got.shape != shape:
            found = f"{got.dtype} {tuple(got.shape)} on {got.device}" if isinstance(got, Tensor) else repr(got)
            raise CheckpointMismatchError(
                f"the checkpoint's {key!r} of parameter {name} is {found}, expected {dtype} {shape}. "
                "It was written for another model, sharding or settings; resume with the same ones."
            )
    if int(state["step"]) < 0:
        raise CheckpointMismatchError(f"the checkpoint's step of parameter {name} is {int(state['step'])}: damaged.")
    if layout.has_window and "indices" in layout.tensors:
        window = {key: state[key].contiguous() for key in WINDOW_TENSORS if key in layout.tensors}
        if not indices_are_valid(layout, window):
            raise CheckpointMismatchError(f"the checkpoint's window of parameter {name} points outside its blocks.")
