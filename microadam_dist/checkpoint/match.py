"""Whether a state dict, or state that others put there, fits an optimizer; asked before anything is changed.

Every answer but yes is an error.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import OWN_NAMES, indices_are_valid, state_specs
from ..config import LATER_SETTINGS, SETTING_NAMES, MicroAdamConfig, structural_difference
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
        or not all(isinstance(group, Mapping) and _are_keys(group.get("params")) for group in groups)
        or not isinstance(state, Mapping)
    ):
        raise CheckpointMismatchError(
            f"no optimizer's state dict: it has {sorted(map(str, state_dict))}, expected 'state' and 'param_groups'. "
            "Of a whole training checkpoint, load the optimizer's part."
        )
    if unknown := set(state).difference(*(group["params"] for group in groups)):
        raise CheckpointMismatchError(
            f"the checkpoint has state of parameters that are in none of its groups ({min(map(str, unknown))}, ...). "
            "It is damaged, or keys were changed in one place only: load another one."
        )
    return groups, state


def _are_keys(params: Any) -> bool:
    """Whether this can be what a group says about its parameters: numbers, or names."""
    return isinstance(params, Sequence) and all(isinstance(key, Hashable) for key in params)


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
    match_settings(saved_groups, groups)


def match_settings(saved_groups: Groups, groups: Groups) -> None:
    """As many saved groups must have the same structural settings, and valid other ones.

    Raises:
        CheckpointMismatchError: Names the group and what differs.
    """
    require_settings(saved_groups)
    for index, (written, group) in enumerate(zip(saved_groups, groups, strict=True)):
        saved = {**LATER_SETTINGS, **written}
        if name := structural_difference(saved, group):
            raise CheckpointMismatchError(
                f"param group {index} of the checkpoint has {name}={saved[name]}, this optimizer {group[name]}. "
                f"State cannot be converted; construct the optimizer with {name}={saved[name]}."
            )


def require_settings(saved_groups: Groups, names: Sequence[str] = SETTING_NAMES) -> None:
    """Saved groups must have these settings, all of them valid.

    Raises:
        CheckpointMismatchError: Names the group and what is wrong.
    """
    for index, written in enumerate(saved_groups):
        saved = {**LATER_SETTINGS, **written}
        if missing := [name for name in names if name not in saved]:
            raise CheckpointMismatchError(
                f"param group {index} of the checkpoint has no {missing[0]!r}: it was not written by MicroAdam, or it "
                "is damaged. Load another one."
            )
        try:
            MicroAdamConfig.from_dict(saved)
        except ConfigError as error:
            raise CheckpointMismatchError(
                f"param group {index} of the checkpoint is damaged: {error} Load another one."
            ) from None


def match_description(state_dict: Mapping[str, Any], layouts: Mapping[int, StateLayout]) -> None:
    """What a state dict says its tensors describe, by position, must agree with its groups and its state.

    Raises:
        CheckpointMismatchError: Names the parameter.
    """
    groups, state = state_dict_parts(state_dict)
    groups = [{**LATER_SETTINGS, **group} for group in groups]
    require_settings(groups)
    members = [(group, key) for group in groups for key in group["params"]]
    for index, layout in layouts.items():
        name = ", ".join(span.fqn for span in layout.spans)
        if not 0 <= index < len(members) or members[index][1] not in state:
            raise CheckpointMismatchError(
                f"the state of parameter {name} is missing in the checkpoint, which describes it: it is damaged. Copy "
                "it again, or load an earlier one."
            )
        settings = layout.config.structural
        if different := structural_difference(members[index][0], settings):
            raise CheckpointMismatchError(
                f"the state of parameter {name} has {different}={settings[different]}, its param group in the "
                f"checkpoint {members[index][0][different]}: it is damaged. Copy it again, or load an earlier one."
            )


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


def match_module(
    module: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, tuple[int, ...]],
    where: Path,
    frozen: Set[str] = frozenset(),
) -> None:
    """A module and a checkpoint must have the same tensors, trained or frozen, in either.

    Args:
        module: The module's tensors; one that is tied may be saved under any of its names.
        shapes: Of the same, whole.
        saved: Shapes of those in the checkpoint.
        where: The checkpoint.
        frozen: Names of parameters that it may lack, all of them: Trainer saves adapters without the frozen rest.

    Raises:
        CheckpointMismatchError: Names one that differs.
    """
    there = {id(tensor) for name, tensor in module.items() if name in saved}
    missing = [name for name, tensor in module.items() if id(tensor) not in there]
    if frozen.isdisjoint(saved):
        missing = [name for name in missing if name not in frozen]
    if differing := [name for name in saved if shapes.get(name) != saved[name]] + missing:
        name = differing[0]
        raise CheckpointMismatchError(
            f"{len(differing)} tensors differ, such as {name!r}: {shapes.get(name, 'not there')} in the model, "
            f"{saved.get(name, 'not there')} in {where}. It belongs to another model. Load it into "
            "the one that was saved, or another checkpoint."
        )


def match_names(state: Any, layout: StateLayout, name: str) -> None:
    """One parameter's state must have the tensors of its layout, and none of another one; keys of others may be there.

    Raises:
        CheckpointMismatchError: Names what is there and what is expected.
    """
    expected = {"step", *layout.tensors}
    if not isinstance(state, Mapping) or OWN_NAMES.intersection(state) != expected:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else _describe(state)
        reason = (
            "It was made by another optimizer or for a parameter of another shape; load a state dict of MicroAdam, or "
            "start without its state."
        )
        if "bucket_lo" in found and "bucket_scale" in expected:
            reason = (
                f"Before version 0.2 buckets had a range with ef_bits={layout.config.ef_bits}, now a scale: start "
                "without its state, or go on with the version that saved it."
            )
        raise CheckpointMismatchError(
            f"the state of parameter {name} has {found}, expected {sorted(expected)}. {reason}"
        )


def match_tensors(state: Mapping[str, Any], layout: StateLayout, name: str) -> None:
    """This rank's part of one parameter's state must have the dtypes and shapes of its layout, and valid contents.

    Raises:
        CheckpointMismatchError: Names the tensor, what it is and what is expected.
    """
    match_shapes(state, layout, name)
    if layout.has_window and "indices" in layout.tensors:
        window = {key: state[key].contiguous() for key in WINDOW_TENSORS if key in layout.tensors}
        if not indices_are_valid(layout, window):
            raise CheckpointMismatchError(
                f"'indices' of parameter {name} point outside their blocks: damaged. Load another checkpoint."
            )


def match_shapes(state: Mapping[str, Any], layout: StateLayout, name: str) -> None:
    """`match_tensors` without a look at the contents, but for the number of steps.

    Raises:
        CheckpointMismatchError: Names the tensor, what it is and what is expected.
    """
    read_step(state["step"], name)
    for key, (dtype, _) in state_specs(layout).items():
        got, shape = state[key], layout.shapes[key]
        if not isinstance(got, Tensor) or got.is_meta or got.dtype != dtype or got.shape != shape:
            raise CheckpointMismatchError(
                f"{key!r} of parameter {name} is {_describe(got)}, expected {dtype} {shape}. It was made for another "
                "model, sharding or settings, or converted: resume with the same ones, from a state dict as saved."
            )


def match_memory(state: Mapping[str, Any], layout: StateLayout, device: torch.device, name: str) -> None:
    """Tensors that `match_tensors` has accepted must lie where a kernel may write to them through their addresses.

    Raises:
        CheckpointMismatchError: Names the tensor that is on another device, not contiguous or without memory.
    """
    for key in layout.tensors:
        got = state[key]
        if got.device != device or not got.is_contiguous() or (got.numel() and not got.data_ptr()):
            raise CheckpointMismatchError(
                f"{key!r} of parameter {name} is on {got.device} with strides {got.stride()}, expected contiguous "
                f"memory on {device}: put tensor.to(device).contiguous() there, or use load_state_dict, which does so."
            )


def read_step(step: Any, name: str) -> int:
    """The number of steps that a parameter's ``step`` says: an integer, or a float that cannot have been rounded.

    Raises:
        CheckpointMismatchError: It is no such number.
    """
    value = step.item() if isinstance(step, Tensor) and step.ndim == 0 and not step.is_meta else step
    limit = 2.0**63
    if type(value) is float:  # larger ones may stand for several integers
        limit = 2 / torch.finfo(step.dtype if isinstance(step, Tensor) else torch.float64).eps
    if type(value) not in (int, float) or not 0 <= value < limit or value != int(value):
        raise CheckpointMismatchError(
            f"'step' of parameter {name} is {_describe(value)}, expected the number of its steps as an integer: "
            "damaged, or converted. Load a state dict as it was saved."
        )
    return int(value)


def _describe(found: Any) -> str:
    return f"{found.dtype} {tuple(found.shape)} on {found.device}" if isinstance(found, Tensor) else reprlib.repr(found)
