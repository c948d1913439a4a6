"""Rewrites a ZeRO checkpoint for another number of ranks, offline; `engine.load_checkpoint` then reads it as its own.

One rank's tensors at a time are built in files that are mapped into memory, so what is resident is what is being
copied. The layouts are those DeepSpeed 0.19.8 makes:

- stages 1 and 2: the parameters of a group one after the other, padded to a multiple of 2 x ranks, in equal parts;
- stage 3: every parameter padded to a multiple of the ranks and cut into equal parts; a group is split into sub-groups
  that hold at least ``sub_group_size`` elements on a rank.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import CheckpointMismatchError, ConfigError
from ..layout import ShardSpan, StateLayout
from ..state import state_specs
from .deepspeed import DeepSpeedCheckpoint, read_checkpoint
from .format import LAYOUT_KEY, describe_layouts
from .reshard import Resharder, SourceShard

_ALIGNMENT = 2  # ZeRO-1 and 2 align every rank's part to this many elements
_DEFAULT_SUB_GROUP_SIZE = 1_000_000_000

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how much of it is finished, how much there is)."""


@dataclass(frozen=True)
class _Parameter:
    fqn: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Shard:
    """One local tensor of one rank to be written: its layout, its length with padding, and the padding at its end."""

    layout: StateLayout
    numel: int
    end_padding: int


def reshard_checkpoint(
    source: str | Path,
    target: str | Path,
    world_size: int,
    tag: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[tuple[str, int, int]]:
    """Write the checkpoint in ``source`` for ``world_size`` ranks to ``target``, and verify what was written.

    Args:
        source: A checkpoint folder of ZeRO stage 1, 2 or 3.
        target: A folder that does not exist yet; it appears only when it is complete.
        world_size: Number of data-parallel ranks to write for.
        tag: Which checkpoint in ``source``; the newest by default.
        progress: Told how far the work is.

    Returns:
        (parameter, start, end) of the blocks that were cut in another way and had to be rebuilt; all else is exact.

    Raises:
        ConfigError: The number of ranks or the target folder cannot be used.
        CheckpointMismatchError: The source is damaged, or no checkpoint that needs or allows resharding.
    """
    if world_size < 1:
        raise ConfigError(f"world size {world_size}: expected at least 1.")
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists already; give a new folder.")
    checkpoint = read_checkpoint(source, tag)
    writer = _Writer(checkpoint, world_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        folder = Path(unfinished) / "checkpoint" / checkpoint.folder.name
        folder.mkdir(parents=True)
        for rank in range(world_size):
            progress("writing", rank, world_size)
            with tempfile.TemporaryDirectory(dir=unfinished) as scratch:
                writer.write_rank(rank, folder, Path(scratch))
        progress("writing", world_size, world_size)
        (folder.parent / "latest").write_text(checkpoint.folder.name)
        rebuilt = writer.resharder.rebuilt
        _verify(checkpoint, read_checkpoint(folder.parent), rebuilt, progress)
        folder.parent.rename(target)
    return rebuilt


class _Writer:
    """Builds every rank's files from a checkpoint."""

    def __init__(self, checkpoint: DeepSpeedCheckpoint, world_size: int) -> None:
        self.checkpoint, self.world_size = checkpoint, world_size
        self.resharder = Resharder(shard for shards in checkpoint.shards for shard in shards)
        if checkpoint.stage == 0:
            raise CheckpointMismatchError(
                f"{checkpoint.folder} is a stage 0 checkpoint: it loads on any number of ranks as it is."
            )
        config = checkpoint.optim_states[0]["ds_config"]["zero_optimization"]
        if config.get("round_robin_gradients"):
            raise CheckpointMismatchError(
                f"{checkpoint.folder} was written with round_robin_gradients: the order of parameters depends on the "
                "number of ranks. Load it with microadam_dist.deepspeed.load_checkpoint instead."
            )
        self.sub_group_size = int(float(config.get("sub_group_size", _DEFAULT_SUB_GROUP_SIZE)))

    def write_rank(self, rank: int, folder: Path, scratch: Path) -> None:
        """Write the optimizer file of a rank, and its model file (stage 3: each rank, else the first)."""
        shards = self._shards(rank)
        weights, states = [], {}
        for index, shard in enumerate(shards):
            flat = _file_tensor(scratch / f"weights{index}", shard.numel, self._weights_dtype)
            self.resharder.weights(shard.layout, flat)
            weights.append(flat[: shard.numel - shard.end_padding])
            state = self.resharder.state(shard.layout, _allocator(scratch / f"state{index}"))
            assert state is not None  # a checkpoint that was never stepped has no layouts to read
            states[index] = state
        optim = copy.copy(dict(self.checkpoint.optim_states[0]))
        zero = optim["optimizer_state_dict"] = dict(optim["optimizer_state_dict"])
        base_key = "base_optimizer_state" if self.checkpoint.stage < 3 else "optimizer_state_dict"
        layouts = {index: shard.layout for index, shard in enumerate(shards)}
        zero[base_key] = {
            "state": states,
            "param_groups": self._param_groups(),
            LAYOUT_KEY: describe_layouts(layouts, rank, self.world_size),
        }
        if self.checkpoint.stage == 3:
            zero["fp32_flat_groups"], zero["partition_count"] = weights, self.world_size
        else:
            zero["single_partition_of_fp32_groups"] = weights
            zero["group_paddings"] = [shard.end_padding for shard in shards]
            zero["partition_count"] = [self.world_size] * len(shards)
            zero.pop("param_slice_mappings", None)  # for universal checkpoints only, which hold no state of ours
        prefix = "bf16_" if "bf16" in optim["ds_config"] and optim["ds_config"]["bf16"].get("enabled") else ""
        torch.save(optim, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        self._write_model_file(rank, folder)

    def _write_model_file(self, rank: int, folder: Path) -> None:
        model = {**self.checkpoint.model_states[0], "dp_world_size": self.world_size}
        if self.checkpoint.stage < 3:
            if rank == 0:
                torch.save(model, folder / "mp_rank_00_model_states.pt")
            return
        whole = self.checkpoint.untrained_tensors()
        fragments = {}
        for name, shape in (model["frozen_param_shapes"] or {}).items():
            share = -(-shape.numel() // self.world_size)
            padded = torch.nn.functional.pad(whole[name].flatten(), (0, share * self.world_size - shape.numel()))
            fragments[name] = padded[rank * share : (rank + 1) * share].clone()
        model["frozen_param_fragments"] = fragments
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")

    @property
    def _weights_dtype(self) -> torch.dtype:
        return self.checkpoint.shards[0][0].weights.dtype

    def _groups(self) -> Iterator[tuple[list[_Parameter], MicroAdamConfig]]:
        """The parameters of every param group, in the order in which DeepSpeed lays them out."""
        for group in self.checkpoint.param_groups:
            tensors = [[shards[index] for shards in self.checkpoint.shards] for index in group["params"]]
            parameters = [parameter for ranks in tensors for parameter in self._ordered_parameters(ranks)]
            yield parameters, tensors[0][0].layout.config

    def _ordered_parameters(self, ranks: Sequence[SourceShard]) -> list[_Parameter]:
        begins: dict[_Parameter, int] = {}
        # Where a parameter begins: in the rank's own shard (stage 3), or in the buffer that was cut (stages 1 and 2).
        # The first rank has no padding unless it is the last, so its length is every rank's length.
        for rank, shard in enumerate(ranks):
            shard_start = rank * ranks[0].weights.numel() if self.checkpoint.stage < 3 else 0
            for span in shard.layout.spans:
                skipped = span.start if self.checkpoint.stage < 3 else 0
                begins.setdefault(_Parameter(span.fqn, span.global_shape), shard_start + span.offset - skipped)
        return sorted(begins, key=lambda parameter: begins[parameter])

    def _shards(self, rank: int) -> list[_Shard]:
        shards = []
        for parameters, config in self._groups():
            if self.checkpoint.stage < 3:
                shards.append(self._flat_shard(parameters, config, rank))
            else:
                shards += [self._partitioned_shard(part, config, rank) for part in self._sub_groups(parameters)]
        return shards

    def _flat_shard(self, parameters: Sequence[_Parameter], config: MicroAdamConfig, rank: int) -> _Shard:
        total = sum(parameter.numel for parameter in parameters)
        share = -(-total // (_ALIGNMENT * self.world_size)) * _ALIGNMENT
        shard_start, shard_end = rank * share, (rank + 1) * share
        spans, begin = [], 0
        for parameter in parameters:
            start, end = max(begin, shard_start), min(begin + parameter.numel, shard_end)
            if start < end:
                spans.append(ShardSpan(parameter.fqn, parameter.shape, start - begin, end - start, start - shard_start))
            begin += parameter.numel
        end_padding = min(share, max(0, shard_end - total))
        return _Shard(StateLayout(tuple(spans), config), share, end_padding)

    def _sub_groups(self, parameters: Sequence[_Parameter]) -> Iterator[list[_Parameter]]:
        sub_group: list[_Parameter] = []
        for parameter in parameters:
            sub_group.append(parameter)
            if sum(self._share(member) for member in sub_group) >= self.sub_group_size:
                yield sub_group
                sub_group = []
        if sub_group:
            yield sub_group

    def _share(self, parameter: _Parameter) -> int:
        return -(-parameter.numel // self.world_size)

    def _partitioned_shard(self, parameters: Sequence[_Parameter], config: MicroAdamConfig, rank: int) -> _Shard:
        spans, offset = [], 0
        for parameter in parameters:
            share = self._share(parameter)
            start = min(rank * share, parameter.numel)
            numel = min(share, parameter.numel - start)
            spans.append(ShardSpan(parameter.fqn, parameter.shape, start, numel, offset))
            offset += share
        return _Shard(StateLayout(tuple(spans), config), offset, end_padding=0)

    def _param_groups(self) -> list[dict[str, Any]]:
        """The saved groups with the indices of the new tensors."""
        groups, index = [], 0
        for saved, (parameters, _) in zip(self.checkpoint.param_groups, self._groups(), strict=True):
            count = 1 if self.checkpoint.stage < 3 else len(list(self._sub_groups(parameters)))
            groups.append({**saved, "params": list(range(index, index + count))})
            index += count
        return groups


def _file_tensor(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """A zeroed tensor in a file, so that its memory can be reclaimed."""
    if numel == 0:
        return torch.zeros(0, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


def _allocator(prefix: Path) -> Callable[[StateLayout], dict[str, Tensor]]:
    def allocate(layout: StateLayout) -> dict[str, Tensor]:
        return {
            name: _file_tensor(prefix.with_name(f"{prefix.name}-{name}"), numel, dtype)
            for name, (dtype, numel) in state_specs(layout).items()
        }

    return allocate


def _verify(
    source: DeepSpeedCheckpoint,
    written: DeepSpeedCheckpoint,
    rebuilt: Sequence[tuple[str, int, int]],
    progress: Progress,
) -> None:
    """Cut what was written back to the source's shards: all must be equal but the blocks that had to be rebuilt.

    Raises:
        CheckpointMismatchError: Something differs, so the disk or this code is at fault.
    """
    resharder = Resharder(shard for shards in written.shards for shard in shards)
    shards = [shard for rank in source.shards for shard in rank]
    for number, shard in enumerate(shards):
        progress("verifying", number, len(shards))
        with tempfile.TemporaryDirectory(dir=written.folder.parent.parent) as scratch:
            weights = _file_tensor(Path(scratch) / "weights", shard.weights.numel(), shard.weights.dtype)
            weights.copy_(shard.weights)  # the padding
            resharder.weights(shard.layout, weights)
            state = resharder.state(shard.layout, _allocator(Path(scratch) / "state"))
            differing = [] if torch.equal(weights, shard.weights) else ["weights"]
            assert shard.state is not None and state is not None  # neither was saved before the first step
            ignored = _StateMask(shard.layout, [*rebuilt, *resharder.rebuilt])
            differing += [name for name in state if not ignored.equal(name, state[name], shard.state[name])]
        if differing:
            raise CheckpointMismatchError(
                f"verification failed: {', '.join(differing)} of {shard.origin} cannot be read back from what was "
                "written. Nothing was left behind; check the disk and try again."
            )
    progress("verifying", len(shards), len(shards))


class _StateMask:
    """Compares state tensors outside some blocks of a layout."""

    def __init__(self, layout: StateLayout, ignored: Sequence[tuple[str, int, int]]) -> None:
        self._slices: dict[str, list[slice]] = {name: [] for name in ("step", *layout.tensors)}
        for index, span in enumerate(layout.spans):
            for start, end in {(s, e) for fqn, s, e in ignored if fqn == span.fqn and not span.is_dense}:
                first = max(layout.grid(span).block_interval(start)[0], span.start)
                last = min(layout.grid(span).block_interval(end - 1)[1], span.start + span.numel)
                if first < last:
                    for name, part in layout.state_slices(index, first, last).items():
                        self._slices[name].append(part)

    def equal(self, name: str, got: Tensor, expected: Tensor) -> bool:
        """Whether both are equal outside the ignored blocks; ``got`` is overwritten inside them."""
        for part in self._slices[name]:
            got[part] = expected[part]
        return torch.equal(got, expected)
