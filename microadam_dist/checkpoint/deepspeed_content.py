"""Whether DeepSpeed's files hold what is read from them, by DeepSpeed or here; asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..engines.cuts import zero3_share
from ..errors import CheckpointMismatchError

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size")
# By ZeRO stage; 2 stands for 1, too.
_OPTIMIZER_KEYS = {
    2: ("base_optimizer_state", "single_partition_of_fp32_groups", "ds_version"),
    3: ("optimizer_state_dict", "fp32_flat_groups", "loss_scaler", "dynamic_loss_scale", "overflow"),
}
_16_BIT_KEYS = ("optimizer_state_dict", "fp32_groups", "dynamic_loss_scale", "cur_scale", "cur_iter")


def require_model_states(states: Mapping[str, Any], stage: int, num_files: int) -> None:
    """A model file must have weights, counters and frozen parameters; experts may lie elsewhere.

    Args:
        states: Its content.
        stage: The ZeRO stage that wrote it.
        num_files: How many model files there are.

    Raises:
        CheckpointMismatchError: Says what is missing or wrong.
    """
    _require_keys(states, ("module", "lr_scheduler", *_COUNTERS))
    for name in _COUNTERS:
        if type(states[name]) is not int or states[name] < 0:
            raise _damaged(f"{name!r} is {states[name]!r}, expected a number")
    for name, tensor in states["module"].items():
        if not isinstance(name, str) or not (isinstance(tensor, Tensor) or name.endswith("_extra_state")):
            raise _damaged(f"{name!r} of the module is {type(tensor).__name__}, expected a tensor")
    if stage == 3:
        _require_keys(states, ("buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"))
    fragments = states.get("frozen_param_fragments") or {}
    for name, shape in (states.get("frozen_param_shapes") or {}).items():
        expected = (zero3_share(shape, num_files),) if stage == 3 else tuple(shape)
        found = fragments.get(name)
        if not isinstance(found, Tensor) or found.shape != expected:
            got = tuple(found.shape) if isinstance(found, Tensor) else "missing"
            raise _damaged(f"this rank's part of frozen parameter {name!r} is {got}, expected {expected}")


def require_optimizer_states(states: Mapping[str, Any], stage: int) -> None:
    """A file with the optimizer's state must have what goes with it: of stage 0 this is the model file.

    Raises:
        CheckpointMismatchError: Says what is missing or wrong.
    """
    if stage:
        _require_keys(states, ("optimizer_state_dict",))
        zero = states["optimizer_state_dict"]
        _require_keys(zero, _OPTIMIZER_KEYS[stage])
        if stage == 2 and not isinstance(zero["ds_version"], str):
            raise _damaged(f"'ds_version' is {zero['ds_version']!r}")
        return
    _require_keys(states, ("optimizer",))
    if isinstance(states["optimizer"], Mapping) and not {"state", "param_groups"} & states["optimizer"].keys():
        _require_keys(states["optimizer"], _16_BIT_KEYS)


def _require_keys(states: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(states, Mapping):
        raise _damaged(f"expected {keys[0]!r} and others, got {type(states).__name__}")
    if missing := [key for key in keys if key not in states]:
        raise _damaged(f"{missing[0]!r} is missing")


def _damaged(what: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(f"{what}. The file is damaged: copy it again, or load an earlier checkpoint.")
