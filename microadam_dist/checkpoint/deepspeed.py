"""Reads checkpoints written by DeepSpeed's `save_checkpoint`, of any stage and number of ranks.

    <dir>/latest                                              name of the newest tag
    <dir>/<tag>/mp_rank_00_model_states.pt                    stages 0 to 2: modules, counters; stage 0: the optimizer
    <dir>/<tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt   stage 3: the same, parameters empty but for frozen ones
    <dir>/<tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   stages 1 to 3: rank r's shards
    <dir>/<tag>/layer_<l>_expert_<e>_mp_rank_00_model_states.pt      expert e of MoE layer l, under its global name
    <dir>/<tag>/expp_rank_<r>_mp_rank_00_optim_states.pt   stage 0, MoE: the optimizer of expert-parallel rank r

What DeepSpeed 0.19.8 writes. The files are memory-mapped: only what is copied is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import flatten_state
from ..config import MicroAdamConfig
from ..errors import CheckpointMismatchError
from ..layout import ShardSpan, StateLayout, plain_fqn
from .deepspeed_content import require_model_states, require_optimizer_states
from .deepspeed_files import EXPERT_FILE, EXPERT_OPTIM_FILE, CheckpointFiles, files_by_rank, in_file, load_file
from .format import LAYOUT_KEY, read_layouts
from .integrity import require_intact
from .match import match_description, match_names, match_shapes
from .reshard import Resharder, SourceShard
from .training import SavedTraining


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """One tag of a DeepSpeed checkpoint.

    Attributes:
        folder: The tag's folder.
        model_states: Content of the model files, by rank; one for stages 0 to 2.
        optim_states: Content of the optimizer files, by rank; none for stage 0.
        shards: All local tensors of all ranks, in a list for each rank.
        experts: Of each tensor in an expert of a MoE layer, its names in all experts of the layer.
    """

    folder: Path
    model_states: list[Mapping[str, Any]]
    optim_states: list[Mapping[str, Any]]
    shards: list[list[SourceShard]]
    experts: list[tuple[str, ...]]

    @property
    def stage(self) -> int:
        """The ZeRO stage that wrote it (1 and 2 write the same)."""
        if not self.optim_states:
            return 0
        return 3 if "fp32_flat_groups" in self.optim_states[0]["optimizer_state_dict"] else 2

    @property
    def param_groups(self) -> Sequence[Mapping[str, Any]]:
        """The saved param groups: learning rates and other settings at the time."""
        groups: Sequence[Mapping[str, Any]] = self._base_state(0)["param_groups"]
        return groups

    def untrained_tensors(self) -> dict[str, Tensor]:
        """What no optimizer state describes, whole: buffers, frozen and never stepped parameters; by `plain_fqn`."""
        trained = {span.fqn for shards in self.shards for shard in shards for span in shard.layout.spans}
        first = self.model_states[0]
        found = {name: tensor for name, tensor in _module(first).items() if name not in trained}
        if self.stage == 3:  # parameters are empty there
            found = {name: found[name] for name in map(plain_fqn, first["buffer_names"])}
        # A layer that is trained now and then is frozen when it is saved, and there twice.
        frozen = {name: tensor for name, tensor in self.frozen_parameters().items() if name not in trained}
        return found | frozen

    def frozen_parameters(self) -> dict[str, Tensor]:
        """What required no gradient when it was saved, whole, as ZeRO-2 and 3 save it; by `plain_fqn`."""
        found = {}
        for name, shape in (self.model_states[0].get("frozen_param_shapes") or {}).items():
            fragments = [states["frozen_param_fragments"][name].flatten() for states in self.model_states]
            found[plain_fqn(name)] = torch.cat(fragments)[: math.prod(shape)].view(shape)
        return found

    def sources(self) -> list[SourceShard]:
        """Everything that was saved: all shards; what was not trained as whole parameters that were never stepped."""
        untrained = [
            SourceShard(
                StateLayout((ShardSpan.whole(name, tuple(tensor.shape)),), MicroAdamConfig()),
                None,
                tensor.flatten(),
                str(self.folder),
            )
            for name, tensor in self.untrained_tensors().items()
        ]
        return [*untrained, *(shard for shards in self.shards for shard in shards)]

    def training(self) -> SavedTraining:
        """All of it, to be loaded into any engine."""
        with in_file(self.folder):
            first, resharder = self.model_states[0], Resharder(self.sources())
        engine = f"ZeRO-{self.stage} on {first['dp_world_size']} ranks"
        scheduler = first.get("lr_scheduler")
        return SavedTraining(self.folder, engine, resharder, resharder.states, self.param_groups, scheduler)

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scaler, None from stage 0."""
        return self.optim_states[0]["optimizer_state_dict"].get("loss_scaler") if self.optim_states else None

    def _base_state(self, rank: int) -> Mapping[str, Any]:
        return _base_state(self.optim_states[rank] if self.optim_states else self.model_states[0])


def read_checkpoint(folder: str | Path, tag: str | None = None, share: tuple[int, int] = (0, 1)) -> DeepSpeedCheckpoint:
    """Open a checkpoint and check that it is whole.

    Args:
        folder: What was given to `save_checkpoint`.
        tag: Which one in it; the newest by default.
        share: (rank, number of ranks) of those that compare the files with their checksums, each some of them.

    Raises:
        CheckpointMismatchError: Names the file that is missing, damaged or not ours.
    """
    files = CheckpointFiles.find(folder, tag)
    expert_files = [path for path in sorted(files.folder.glob("*.pt")) if EXPERT_FILE.fullmatch(path.name)]
    for path in [*files.model, *files.optim, *expert_files][share[0] :: share[1]]:
        require_intact(path, str(path))
    model_states = [load_file(path) for path in files.model]
    optim_states = [load_file(path) for path in files.optim]
    files.require_all_ranks(model_states[0])
    _require_contents(files, zip(files.model, model_states, strict=True), zip(files.optim, optim_states, strict=True))
    with in_file(files.folder):
        model_states[0], experts = _with_experts(files.folder, model_states[0])
        if optim_states:
            shards = [_zero_shards(*pair) for pair in zip(files.optim, optim_states, strict=True)]
        else:
            optimizers = {path: load_file(path) for path in files_by_rank(files.folder, EXPERT_OPTIM_FILE)}
            shards = [
                _stage0_shards(path, {**model_states[0], **states})
                for path, states in (optimizers or {files.model[0]: {}}).items()
            ]
            _require_all_experts(files.folder, experts, shards)
        _require_same_shapes(_shapes(model_states[0], files.stage), shards)
    return DeepSpeedCheckpoint(files.folder, model_states, optim_states, shards, experts)


def _require_contents(
    files: CheckpointFiles,
    model: Iterable[tuple[Path, Mapping[str, Any]]],
    optim: Iterable[tuple[Path, Mapping[str, Any]]],
) -> None:
    """What is in some of the files must be all that is read from them."""
    for path, states in model:
        with in_file(path):
            require_model_states(states, files.stage, len(files.model))
    for path, states in optim:
        with in_file(path):
            require_optimizer_states(states, files.stage)


def _with_experts(folder: Path, states: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[tuple[str, ...]]]:
    """A model file with the weights of the experts in it, as if they were no experts, and their names.

    See `DeepSpeedCheckpoint.experts`; both unchanged and empty for a model without MoE layers.

    Raises:
        CheckpointMismatchError: The file of an expert is missing, or DeepSpeed's AutoEP has written it.
    """
    moe_keys = ("num_experts", "ds_autoep_layers")
    if moe_keys[1] not in states and not any(folder.glob("layer_*_expert_*_model_states.pt")):
        return states, []
    if states.get(moe_keys[1]):
        raise CheckpointMismatchError(
            f"{folder} was written with AutoEP (expert_parallel in the DeepSpeed configuration), whose ranks give "
            "different experts the same name. Load it with engine.load_checkpoint on the same number of ranks."
        )
    module = dict(states["module"])
    names: list[tuple[str, ...]] = []
    for layer, num_experts in enumerate(states[moe_keys[0]]):
        files = [folder / f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt" for e in range(num_experts)]
        if missing := [path for path in files if not path.is_file()]:
            raise CheckpointMismatchError(f"{missing[0]}, the weights of an expert, is missing; copy it there.")
        experts = [load_file(path) for path in files]
        for expert in experts:
            module |= expert
        names += zip(*(map(plain_fqn, expert) for expert in experts), strict=True)
    rest = {key: value for key, value in states.items() if key not in moe_keys}
    return {**rest, "module": module}, names


def _require_same_shapes(shapes: Mapping[str, tuple[int, ...]], shards: Sequence[Sequence[SourceShard]]) -> None:
    """The module's files and the optimizer's must be of the same model."""
    for span in (span for rank in shards for shard in rank for span in shard.layout.spans):
        if shapes.get(span.fqn) != span.global_shape:
            raise CheckpointMismatchError(
                f"parameter {span.fqn!r} has shape {span.global_shape} in the optimizer's state, "
                f"{shapes.get(span.fqn, 'not there')} in the module: damaged, or files of several checkpoints are "
                "mixed. Copy the checkpoint again, or load an earlier one."
            )


def _require_all_experts(
    folder: Path, experts: Sequence[tuple[str, ...]], shards: Sequence[Sequence[SourceShard]]
) -> None:
    """Nothing in stage 0 says how many files there were, and a missing one would pass for experts never trained."""
    trained = {span.fqn for rank in shards for shard in rank for span in shard.layout.spans}
    for names in experts:
        if untrained := set(names) - trained if trained.intersection(names) else None:
            raise CheckpointMismatchError(
                f"{folder} has optimizer state of other experts, but not of {min(untrained)!r}: a file "
                "expp_rank_*_optim_states.pt is missing. Copy it, or, if these experts alone were frozen, load with "
                "engine.load_checkpoint on the same number of ranks."
            )


@dataclass(frozen=True)
class RankFiles:
    """What `engine.load_checkpoint` reads on one rank.

    Attributes:
        path: The file with the optimizer's state, for messages.
        stage: The ZeRO stage that wrote it; 2 stands for 1, too.
        world_size: Number of data-parallel ranks that wrote it.
        shapes: Of the tensors that the module files have or stand for, by `plain_fqn`.
        optimizer: MicroAdam's state dict, or another optimizer's.
        module: The module's tensors by the names that DeepSpeed loads them by, empty under ZeRO-3;
            None if some are in the files of experts.
    """

    path: Path
    stage: int
    world_size: int
    shapes: dict[str, tuple[int, ...]]
    optimizer: Mapping[str, Any]
    module: Mapping[str, Tensor] | None

    @classmethod
    def read(cls, folder: str | Path, tag: str | None, rank: int) -> RankFiles:
        """Open the files of a data-parallel rank, or of the first when there are not so many.

        Raises:
            CheckpointMismatchError: Names the file that is missing, or the one of these that is damaged.
        """
        files = CheckpointFiles.find(folder, tag)
        own = [paths[rank if rank < len(paths) else 0] for paths in (files.model, files.optim) if paths]
        for path in own:
            require_intact(path, str(path))
        states = [load_file(path) for path in own]
        files.require_all_ranks(states[0])
        paired = list(zip(own, states, strict=True))
        _require_contents(files, paired[:1], [])
        with in_file(files.folder):
            states[0], experts = _with_experts(files.folder, states[0])
            checkpoint = DeepSpeedCheckpoint(files.folder, states[:1], states[1:], [], experts)
            stage, shapes = checkpoint.stage, _shapes(states[0], checkpoint.stage)
            base = _base_state(states[-1])
            if LAYOUT_KEY in base:  # else another optimizer's, of which the module may be loaded
                _require_contents(files, [], paired[1:])
                if read_layouts(base[LAYOUT_KEY]) and not experts:
                    _ = _zero_shards(*paired[1]) if stage else _stage0_shards(*paired[0])
            return cls(
                own[-1], stage, states[0]["dp_world_size"], shapes, base, None if experts else states[0]["module"]
            )


def _shapes(model_states: Mapping[str, Any], stage: int) -> dict[str, tuple[int, ...]]:
    """Of everything that a model file has; under ZeRO-3 parameters are empty there, and described elsewhere in it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _module(model_states).items()}
    if stage < 3:
        return shapes
    cut = [*model_states["param_shapes"], model_states["frozen_param_shapes"] or {}]
    buffers = {name: shapes[name] for name in map(plain_fqn, model_states["buffer_names"])}
    return buffers | {plain_fqn(name): tuple(shape) for group in cut for name, shape in group.items()}


def _zero_shards(path: Path, states: Mapping[str, Any]) -> list[SourceShard]:
    zero = states["optimizer_state_dict"]
    if any(any(paddings) for paddings in zero.get("param_alignment_paddings") or ()):
        raise CheckpointMismatchError(
            f"{path} was written with zero_optimization.parameter_alignment, whose padding is not saved. "
            "Load it with engine.load_checkpoint on the same number of ranks."
        )
    weights = zero["fp32_flat_groups"] if "fp32_flat_groups" in zero else zero["single_partition_of_fp32_groups"]
    return _shards(path, _base_state(states), list(weights))


def _stage0_shards(path: Path, states: Mapping[str, Any]) -> list[SourceShard]:
    optimizer, base = states.get("optimizer"), _base_state(states)
    layouts = _layouts(path, base)
    with in_file(path):
        require_optimizer_states(states, 0)
    if isinstance(optimizer, Mapping) and "fp32_groups" in optimizer:  # bf16 or fp16, with master weights
        weights = dict(enumerate(tensor for group in optimizer["fp32_groups"] for tensor in group))
    else:
        module = _module(states)
        weights = {index: module[layout.spans[0].fqn] for index, layout in layouts.items()}
    for index, layout in layouts.items():
        (span,) = layout.spans
        if weights[index].shape != span.global_shape:
            raise CheckpointMismatchError(
                f"the weights of {span.fqn} in {path} have shape {tuple(weights[index].shape)}, the state is of "
                f"{span.global_shape}: damaged. Copy the checkpoint again, or load an earlier one."
            )
    return [_shard(path, base, index, layout, weights[index].flatten()) for index, layout in layouts.items()]


def _module(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's tensors, by the names that spans have."""
    return {plain_fqn(name): tensor for name, tensor in states["module"].items()}


def _shards(path: Path, base: Mapping[str, Any], weights: Sequence[Tensor]) -> list[SourceShard]:
    return [
        _shard(path, base, index, layout, weights[index].detach()) for index, layout in _layouts(path, base).items()
    ]


def _shard(path: Path, base: Mapping[str, Any], index: int, layout: StateLayout, weights: Tensor) -> SourceShard:
    """A local tensor and its state, which must have the lengths that the layout says."""
    names = ", ".join(span.fqn for span in layout.spans)
    with in_file(path):
        match_names(base["state"].get(index), layout, names)
        match_shapes(base["state"][index], layout, names)
        end = max((span.offset + span.numel for span in layout.spans), default=0)
        if weights.ndim != 1 or len(weights) < end or not weights.is_floating_point():
            raise CheckpointMismatchError(
                f"the weights of {names} are {weights.dtype} {tuple(weights.shape)}, expected at least {end} of them: "
                "damaged. Copy the checkpoint again, or load an earlier one."
            )
        own = {name: base["state"][index][name] for name in ("step", *layout.tensors)}
        return SourceShard(layout, flatten_state(own), weights, str(path))


def _layouts(path: Path, base: Mapping[str, Any]) -> dict[int, StateLayout]:
    if LAYOUT_KEY not in base:
        raise CheckpointMismatchError(f"{path} has no MicroAdam state: it was written with another optimizer.")
    layouts = read_layouts(base[LAYOUT_KEY])
    if not layouts:
        raise CheckpointMismatchError(f"{path} was saved before the first step; start from the model's weights.")
    with in_file(path):
        match_description(base, layouts)
    return layouts


def _base_state(states: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our own state dict, under the wrappers of each kind of file."""
    for key in ("optimizer", "optimizer_state_dict", "base_optimizer_state", "optimizer_state_dict"):
        if isinstance(states.get(key), Mapping):
            states = states[key]
    return states
