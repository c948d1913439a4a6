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

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import flatten_state
from ..config import MicroAdamConfig
from ..errors import CheckpointMismatchError
from ..layout import ShardSpan, StateLayout, plain_fqn
from .format import LAYOUT_KEY, read_layouts
from .integrity import require_intact
from .reshard import Resharder, SourceShard
from .training import SavedTraining

_OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_EXPERT_FILE = re.compile(r"(?:layer_\d+_expert|expp_rank)_(\d+)_mp_rank_(\d+)_(?:model|optim)_states\.pt")
_EXPERT_OPTIM_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_TENSOR_PARALLEL_FILE = re.compile(r".*mp_rank_0*[1-9]\d*_(?:model|optim)_states\.pt")


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
    expert_files = [path for path in sorted(files.folder.glob("*.pt")) if _EXPERT_FILE.fullmatch(path.name)]
    for path in [*files.model, *files.optim, *expert_files][share[0] :: share[1]]:
        require_intact(path, str(path))
    model_states = [_load(path) for path in files.model]
    optim_states = [_load(path) for path in files.optim]
    files.require_all_ranks(model_states[0])
    with in_file(files.folder):
        model_states[0], experts = _with_experts(files.folder, model_states[0])
        if optim_states:
            shards = [_zero_shards(*pair) for pair in zip(files.optim, optim_states, strict=True)]
        else:
            optimizers = {path: _load(path) for path in _files_by_rank(files.folder, _EXPERT_OPTIM_FILE)}
            shards = [
                _stage0_shards(path, {**model_states[0], **states})
                for path, states in (optimizers or {files.model[0]: {}}).items()
            ]
            _require_all_experts(files.folder, experts, shards)
    return DeepSpeedCheckpoint(files.folder, model_states, optim_states, shards, experts)


def _require_data_parallel(folder: Path) -> None:
    """The files of modules that are cut in other ways hold parts of them only."""
    parallelism = ""
    if any(folder.glob("layer_*-model_states.pt")):
        parallelism = "pipeline parallelism (PipelineModule)"
    elif any(_TENSOR_PARALLEL_FILE.fullmatch(path.name) for path in folder.glob("*.pt")):
        parallelism = "tensor parallelism"
    if parallelism:
        raise CheckpointMismatchError(
            f"{folder} was written with {parallelism}, and can only be loaded as it was saved: with "
            "engine.load_checkpoint on the same number of ranks, cut in the same way."
        )


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
        experts = [_load(path) for path in files]
        for expert in experts:
            module |= expert
        names += zip(*(map(plain_fqn, expert) for expert in experts), strict=True)
    rest = {key: value for key, value in states.items() if key not in moe_keys}
    return {**rest, "module": module}, names


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
class CheckpointFiles:
    """The files of one tag.

    Attributes:
        folder: The tag's folder.
        model: Model files, by rank; one for stages 0 to 2.
        optim: Optimizer files, by rank; none for stage 0.
    """

    folder: Path
    model: list[Path]
    optim: list[Path]

    @classmethod
    def find(cls, folder: str | Path, tag: str | None) -> CheckpointFiles:
        """Find them; raises a CheckpointMismatchError if one is missing."""
        root = Path(folder)
        if tag is None:
            latest = root / "latest"
            if not latest.is_file():
                raise CheckpointMismatchError(f"{latest} is missing: {root} is no DeepSpeed checkpoint, or give a tag.")
            tag = latest.read_text().strip()
        _require_data_parallel(root / tag)
        files = cls(root / tag, *(_files_by_rank(root / tag, pattern) for pattern in (_MODEL_FILE, _OPTIM_FILE)))
        if not files.model:
            raise CheckpointMismatchError(f"{files.folder} holds no *_model_states.pt: it is no DeepSpeed checkpoint.")
        return files

    @property
    def stage(self) -> int:
        """The ZeRO stage that wrote them; 2 stands for 1, too."""
        if not self.optim:
            return 0
        return 3 if _MODEL_FILE.fullmatch(self.model[0].name)[1] else 2  # type: ignore[index]  # it was found by it

    def require_all_ranks(self, model_states: Mapping[str, Any]) -> None:
        """Raise a CheckpointMismatchError if the last ranks' files are missing."""
        world_size = model_states.get("dp_world_size")
        for files in (self.optim, self.model if len(self.model) > 1 else []):
            if files and len(files) != world_size:
                raise CheckpointMismatchError(
                    f"{self.folder} was written by {world_size} ranks and has {len(files)} files like "
                    f"{files[0].name}; copy the missing ones."
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
    """

    path: Path
    stage: int
    world_size: int
    shapes: dict[str, tuple[int, ...]]
    optimizer: Mapping[str, Any]

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
        states = [_load(path) for path in own]
        files.require_all_ranks(states[0])
        with in_file(files.folder):
            states[0], experts = _with_experts(files.folder, states[0])
            checkpoint = DeepSpeedCheckpoint(files.folder, states[:1], states[1:], [], experts)
            stage, shapes = checkpoint.stage, _shapes(states[0], checkpoint.stage)
            return cls(own[-1], stage, states[0]["dp_world_size"], shapes, _base_state(states[-1]))


def _shapes(model_states: Mapping[str, Any], stage: int) -> dict[str, tuple[int, ...]]:
    """Of everything that a model file has; under ZeRO-3 parameters are empty there, and described elsewhere in it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _module(model_states).items()}
    if stage < 3:
        return shapes
    cut = [*model_states["param_shapes"], model_states["frozen_param_shapes"] or {}]
    buffers = {name: shapes[name] for name in map(plain_fqn, model_states["buffer_names"])}
    return buffers | {plain_fqn(name): tuple(shape) for group in cut for name, shape in group.items()}


@contextlib.contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Errors about what was read say where; what is not where DeepSpeed puts it is a CheckpointMismatchError, too."""
    try:
        yield
    except CheckpointMismatchError as error:
        raise error if str(path) in str(error) else CheckpointMismatchError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointMismatchError(
            f"{path} is no checkpoint of DeepSpeed and MicroAdam that this version can read: {error!r}."
        ) from error


def _files_by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of ranks 0, 1, ... in order."""
    files = {}
    for path in sorted(folder.glob("*.pt")):
        if match := pattern.fullmatch(path.name):
            files[int(match[1] or 0)] = path
    for rank in range(max(files, default=0)):
        if rank not in files:
            example = next(iter(files.values())).name
            raise CheckpointMismatchError(f"in {folder} the file like {example} of rank {rank} is missing.")
    return [files[rank] for rank in sorted(files)]


def _load(path: Path) -> Mapping[str, Any]:
    try:
        # DeepSpeed pickles its loss scaler and configuration, so its files cannot be read with weights_only.
        states: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:
        raise CheckpointMismatchError(f"{path} cannot be read, it is truncated or no checkpoint: {error}") from error
    return states


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
    optimizer, base = states["optimizer"], _base_state(states)
    if isinstance(optimizer, Mapping) and "fp32_groups" in optimizer:  # bf16 or fp16, with master weights
        weights = [tensor.flatten() for group in optimizer["fp32_groups"] for tensor in group]
        return _shards(path, base, weights)
    module = _module(states)
    return [
        SourceShard(layout, _flat_state(base, index), module[layout.spans[0].fqn].flatten(), str(path))
        for index, layout in _layouts(path, base).items()
    ]


def _module(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's tensors, by the names that spans have."""
    return {plain_fqn(name): tensor for name, tensor in states["module"].items()}


def _shards(path: Path, base: Mapping[str, Any], weights: Sequence[Tensor]) -> list[SourceShard]:
    return [
        SourceShard(layout, _flat_state(base, index), weights[index].detach(), str(path))
        for index, layout in _layouts(path, base).items()
    ]


def _flat_state(base: Mapping[str, Any], index: int) -> dict[str, Tensor] | None:
    return flatten_state(base["state"][index]) if index in base["state"] else None


def _layouts(path: Path, base: Mapping[str, Any]) -> dict[int, StateLayout]:
    if LAYOUT_KEY not in base:
        raise CheckpointMismatchError(f"{path} has no MicroAdam state: it was written with another optimizer.")
    layouts = read_layouts(base[LAYOUT_KEY])
    if not layouts:
        raise CheckpointMismatchError(f"{path} was saved before the first step; start from the model's weights.")
    return layouts


def _base_state(states: Mapping[str, Any]) -> Mapping[str, Any]:
    """Our own state dict, under the wrappers of each kind of file."""
    for key in ("optimizer", "optimizer_state_dict", "base_optimizer_state", "optimizer_state_dict"):
        if isinstance(states.get(key), Mapping):
            states = states[key]
    return states
