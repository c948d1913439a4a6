"""For DeepSpeed users: ``"optimizer": {"type": "MicroAdam", "params": {...}}`` in the DeepSpeed JSON.

``import microadam_dist`` is enough, or `microadam_dist.run` for a script that has no such line; the type may be written
in any case. DeepSpeed looks an unknown optimizer type up in `torch.optim`, and ZeRO accepts the classes on its list;
`register` does the former, and the class adds itself to the list when it is constructed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint.deepspeed import DeepSpeedCheckpoint, RankFiles, read_checkpoint
from .checkpoint.deepspeed_files import in_file
from .checkpoint.match import match_module, match_settings
from .checkpoint.training import Read, SavedTraining
from .engines.collectives import process_rank, raise_together
from .engines.deepspeed import (
    NativeLoad,
    before_native_load,
    cuts_module,
    data_parallel_rank,
    frozen_parameters,
    load_untrained,
    module_tensors,
    publish_master_weights,
    whitelist,
    written_stage,
)
from .engines.deepspeed_experts import ExpertNames
from .engines.deepspeed_fragments import filled_param_groups
from .errors import CheckpointMismatchError
from .optimizer import MicroAdam


def register() -> None:
    """Make ``MicroAdam`` known to DeepSpeed's optimizer factory; may be called any number of times.

    Needed by hand only when an optimizer was constructed before DeepSpeed was imported.
    """
    torch.optim.MicroAdam = MicroAdam  # type: ignore[attr-defined]
    _find_in_any_case()
    whitelist(MicroAdam)


@functools.cache
def _find_in_any_case() -> None:
    """DeepSpeed changes the case of its own types only, and asks `torch.optim` for "microadam" as it is written."""
    optim: Any = torch.optim
    find: Callable[[str], Any] | None = getattr(optim, "__getattr__", None)  # torch has none yet

    def find_optimizer(name: str) -> Any:
        if name.lower() == "microadam":
            return MicroAdam
        if find is not None:
            return find(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    optim.__getattr__ = find_optimizer


def disable_shm_allreduce() -> None:
    """On a CPU machine: keep DeepSpeed on gloo instead of its shared-memory all-reduce. Call it before initialization.

    That op is compiled at first use (10 to 50 seconds) and leaves a 66 MB file per rank and run in ``/dev/shm``.
    """
    import deepspeed.ops

    for name in deepspeed.ops.__compatible_ops__:
        if "shm" in name:
            deepspeed.ops.__compatible_ops__[name] = False


def load_checkpoint(engine: Any, folder: str | Path, tag: str | None = None) -> tuple[str, dict[str, Any]]:
    """Resume from a checkpoint of any number of ranks and any ZeRO stage.

    Reads what ``engine.save_checkpoint(folder)`` wrote: weights, optimizer state, learning rates and their scheduler,
    counters. Master weights are exact; so is the state of every block that is cut on neither side, see
    `checkpoint.reshard` for the others. Call it on every rank, after `deepspeed.initialize`.

    Args:
        engine: A DeepSpeed engine around `MicroAdam`.
        folder: The checkpoint folder.
        tag: Which checkpoint in it; the newest by default.

    Returns:
        The folder it was read from and the client state that was saved, as ``engine.load_checkpoint`` does.

    Raises:
        CheckpointMismatchError: A file is missing, damaged or foreign, or the checkpoint belongs to another model.
            Raised on every rank; the engine is as it was.
    """
    with raise_together():
        checkpoint = read_checkpoint(folder, tag, process_rank())
    load_training(engine, lambda _: checkpoint.training())
    return str(checkpoint.folder), _load_counters(engine, checkpoint)


def load_training(engine: Any, read: Read) -> SavedTraining:
    """Load weights, state and settings of any engine into a DeepSpeed engine; every rank calls it.

    Args:
        engine: An engine around `MicroAdam`.
        read: Reads what was saved. Its settings are loaded if it has as many param groups.

    Returns:
        What ``read`` has given.

    Raises:
        CheckpointMismatchError: It does not fit. Raised on every rank; the engine is as it was.
    """
    optimizer: MicroAdam = engine.basic_optimizer
    with filled_param_groups(engine):
        with raise_together():
            saved = read(process_rank())
            held = _held_here(engine, saved.weights.shapes)
            match_module(*_module_tensors(engine), held, saved.origin, frozen_parameters(engine))
            states = optimizer.sharded.fitting_shards(saved.states)
            if loads_settings := len(saved.param_groups) == len(optimizer.param_groups):  # else they are the user's
                match_settings(saved.param_groups, optimizer.param_groups)
        optimizer.sharded.load_shards(states)
        for p, layout in optimizer.sharded.layouts().items():
            saved.weights.weights(layout, p.detach().view(-1))
        if loads_settings:
            optimizer.sharded.load_group_settings([_settings(group) for group in saved.param_groups])
    trained = {named.fqn for group in optimizer.names.sharded or () for named in group}
    load_untrained(engine, ((name, saved.weights.whole(name)) for name in held if name not in trained))
    publish_master_weights(engine)
    return saved


def _module_tensors(engine: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The module's tensors and their whole shapes, by name."""
    tensors = module_tensors(engine)
    return tensors, {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved param group without what says which ranks share the group of experts: the ``ep_size`` may be another."""
    return {key: value for key, value in group.items() if key not in ("name", "moe")}


def _held_here(engine: Any, saved: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What was saved but for experts that other ranks have now."""
    experts = ExpertNames(engine.module)
    return {name: shape for name, shape in saved.items() if not experts.is_elsewhere(name)}


@before_native_load
def _check_native_load(engine: Any, load: NativeLoad) -> None:
    """Look at all that `engine.load_checkpoint` is going to read, before it writes the first weight.

    Raises:
        CheckpointMismatchError: It does not fit. Raised on every rank; the engine is as it was.
    """
    if cuts_module(engine):
        return  # what a rank has to find is not in the files that are looked at
    optimizer: MicroAdam = engine.basic_optimizer
    with filled_param_groups(engine), raise_together():
        files = RankFiles.read(load.folder, load.tag, data_parallel_rank(engine))
        if load.module:
            match_module(*_module_tensors(engine), _held_here(engine, files.shapes), files.path.parent)
        if load.optimizer:
            _require_same_cut(engine, files)
        if load.module:
            _require_same_placeholders(engine, files)
        if load.optimizer:
            with in_file(files.path):
                optimizer.sharded.check(files.optimizer)


def _require_same_placeholders(engine: Any, files: RankFiles) -> None:
    """What torch loads must have exactly the module's keys; under ZeRO-3 parameters are empty there."""
    if files.module is None:
        return  # experts are in files of their own
    here = engine.module.state_dict(keep_vars=True)
    expected = {name: (_kind(x, [0]) if hasattr(x, "ds_id") else _kind(x)) for name, x in here.items()}
    saved = {name: _kind(x) for name, x in files.module.items()}
    if differing := [name for name in expected.keys() | saved.keys() if expected.get(name) != saved.get(name)]:
        name = min(differing)
        raise CheckpointMismatchError(
            f"{name!r} is {saved.get(name, 'not there')} in the module of {files.path.parent}, and "
            f"{expected.get(name, 'not there')} here. It is damaged, belongs to another model or was wrapped in "
            "another way: load it with microadam_dist.deepspeed.load_checkpoint, or load an earlier one."
        )


def _kind(entry: Any, shape: list[int] | None = None) -> str:
    """What DeepSpeed does not convert, or converts to something else."""
    if not isinstance(entry, Tensor):
        return type(entry).__name__
    return f"{'floating' if entry.is_floating_point() else 'of integers'} {shape or list(entry.shape)}"


def _require_same_cut(engine: Any, files: RankFiles) -> None:
    """State is loaded by DeepSpeed itself only where it is cut as it was; stage 0 cuts nothing."""
    written, here = (files.stage, files.world_size), (written_stage(engine), engine.dp_world_size)
    if written != here and (written[0] or here[0]):
        folder, tag = files.path.parent.parent, files.path.parent.name
        raise CheckpointMismatchError(
            f"{files.path.parent} was written by {written[1]} ranks under ZeRO stage {written[0]}, and this is stage "
            f"{here[0]} on {here[1]}. Load it with microadam_dist.deepspeed.load_checkpoint(engine, {str(folder)!r}, "
            f"{tag!r}), or rewrite it with `microadam reshard`."
        )


def _load_counters(engine: Any, checkpoint: DeepSpeedCheckpoint) -> dict[str, Any]:
    """Restore counters, scheduler and loss scale; returns what else was saved."""
    states = dict(checkpoint.model_states[0])
    engine.global_steps = states["global_steps"]
    engine.global_samples = states["global_samples"]
    engine.skipped_steps = states["skipped_steps"]
    if engine.lr_scheduler is not None and states.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(states["lr_scheduler"])
    loss_scaler = checkpoint.loss_scaler
    if loss_scaler is not None and hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler = loss_scaler
    return {key: value for key, value in states.items() if key not in _DEEPSPEED_KEYS}


# What DeepSpeed itself writes into the model file; the rest is the user's client state.
_DEEPSPEED_KEYS = frozenset(
    "module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler "
    "data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size "
    "mp_world_size checkpoint_parallel_dimensions ds_config ds_version".split()
)
