"""Rewrites a ZeRO checkpoint for another number of ranks, offline; `engine.load_checkpoint` then reads it as its own.

One rank's tensors at a time are built in files that are mapped into memory, so what is resident is what is being
copied. Their room is taken from the disk before they are mapped: writing to a map that has none ends the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import shape_state, state_specs
from ..config import MicroAdamConfig
from ..engines.cuts import FlatShard, zero3_shard, zero3_share, zero12_shard
from ..errors import CheckpointMismatchError, ConfigError
from ..layout import StateLayout, plain_fqn
from .deepspeed import DeepSpeedCheckpoint, read_checkpoint
from .deepspeed_files import in_file
from .format import LAYOUT_KEY, describe_layouts
from .match import match_tensors
from .reshard import Resharder, SourceShard, same_bits

_DEFAULT_SUB_GROUP_SIZE = 1_000_000_000

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how much of it is finished, how much there is)."""


def reshard_checkpoint(
    source: str | Path,
    target: str | Path,
    world_size: int,
    tag: str | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[tuple[str, int, int]]:
    """Write the checkpoint in ``source`` for ``world_size`` ranks to ``target``, and verify what was written.

    Args:
        source: A checkpoint folder of ZeRO stage 1, 2 or 3. Other files in it, as Trainer puts there, are copied.
        target: A folder that does not exist yet; it appears only when it is complete.
        world_size: Number of data-parallel ranks to write for.
        tag: Which checkpoint in ``source``; the newest by default.
        progress: Told how far the work is.

    Returns:
        (parameter, start, end) of the blocks that were cut in another way and had to be rebuilt; all else is exact.

    Raises:
        ConfigError: The number of ranks or the target folder cannot be used, or the disk has no room.
        CheckpointMismatchError: The source is damaged, or no checkpoint that needs or allows resharding.
    """
    if world_size < 1:
        raise ConfigError(f"world size {world_size}: expected at least 1.")
    source, target = Path(source), Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists already; give a new folder.")
    checkpoint = read_checkpoint(source, tag)
    with in_file(checkpoint.folder):
        writer = _Writer(checkpoint, world_size)
        needed = writer.needed_bytes()
    others = [path for path in source.iterdir() if path.is_file() and path.name != "latest"]
    _require_room(target, needed + sum(path.stat().st_size for path in others))
    with _unfinished(target) as unfinished:
        folder = unfinished / "checkpoint" / checkpoint.folder.name
        folder.mkdir(parents=True)
        for rank in range(world_size):
            progress("writing", rank, world_size)
            writer.write_rank(rank, folder)
        progress("writing", world_size, world_size)
        (folder.parent / "latest").write_text(checkpoint.folder.name)
        rebuilt = writer.resharder.rebuilt
        _verify(checkpoint, read_checkpoint(folder.parent), rebuilt, progress)
        for path in others:  # Trainer's own, so that it takes the result for a checkpoint
            shutil.copy2(path, folder.parent / path.name)
        folder.parent.rename(target)
    return rebuilt


def _require_room(target: Path, needed: int) -> None:
    disk = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise ConfigError(
            f"{target} needs {needed / 2**20:,.1f} MiB while it is made, and {free / 2**20:,.1f} MiB are free in "
            f"{disk}. Free some, or give a folder on another disk."
        )


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for what is not complete; nothing of it is left, nor of folders made for it.

    Raises:
        ConfigError: It cannot be written.
    """
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            yield Path(folder)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror or error}. Nothing was left behind, and what was read is as "
            "it was."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # not empty: it is complete
            for parent in made:
                parent.rmdir()


class _Writer:
    """Builds every rank's files from a checkpoint."""

    def __init__(self, checkpoint: DeepSpeedCheckpoint, world_size: int) -> None:
        self.checkpoint, self.world_size = checkpoint, world_size
        if checkpoint.experts:
            raise CheckpointMismatchError(
                f"{checkpoint.folder} holds experts of MoE layers, whose own files are not rewritten. Load it with "
                "microadam_dist.deepspeed.load_checkpoint instead, on any number of ranks."
            )
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

    def needed_bytes(self) -> int:
        """Room on the disk, at least: for the files, and for the tensors of one rank of either side beside them."""
        new = [
            sum(
                _num_bytes(StateLayout(shard.spans, config), shard.numel, self._weights_dtype) for shard, config in rank
            )
            for rank in (self._shards(rank) for rank in range(self.world_size))
        ]
        read_back = [
            _num_bytes(s.layout, len(s.weights), s.weights.dtype) for rank in self.checkpoint.shards for s in rank
        ]
        models = sum(path.stat().st_size for path in self.checkpoint.folder.glob("*_model_states.pt"))
        return sum(new) + max(*new, *read_back) + models

    def write_rank(self, rank: int, folder: Path) -> None:
        """Write the optimizer file of a rank, and its model file (stage 3: each rank, else the first)."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            with in_file(self.checkpoint.folder):
                optim = self._optimizer_file(rank, Path(scratch))
                model = self._model_file(rank)
            prefix = "bf16_" if "bf16" in optim["ds_config"] and optim["ds_config"]["bf16"].get("enabled") else ""
            _save(optim, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
            if self.checkpoint.stage == 3:
                _save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            elif rank == 0:
                _save(model, folder / "mp_rank_00_model_states.pt")

    def _optimizer_file(self, rank: int, scratch: Path) -> dict[str, Any]:
        weights, states, layouts, paddings = [], {}, {}, []
        for index, (shard, config) in enumerate(self._shards(rank)):
            layout = layouts[index] = StateLayout(shard.spans, config)
            flat = _file_tensor(scratch / f"weights{index}", shard.numel, self._weights_dtype)
            self.resharder.weights(layout, flat)
            weights.append(flat[: shard.numel - shard.end_padding])
            paddings.append(shard.end_padding)
            state = self.resharder.state(layout, _allocator(scratch / f"state{index}"))
            assert state is not None  # a checkpoint that was never stepped has no layouts to read
            states[index] = shape_state(layout, state)
            match_tensors(states[index], layout, ", ".join(span.fqn for span in layout.spans))
        optim = dict(self.checkpoint.optim_states[0])
        zero = optim["optimizer_state_dict"] = dict(optim["optimizer_state_dict"])
        base_key = "base_optimizer_state" if self.checkpoint.stage < 3 else "optimizer_state_dict"
        zero[base_key] = {
            "state": states,
            "param_groups": self._param_groups(),
            LAYOUT_KEY: describe_layouts(layouts, rank, self.world_size),
        }
        if self.checkpoint.stage == 3:
            zero["fp32_flat_groups"], zero["partition_count"] = weights, self.world_size
        else:
            zero["single_partition_of_fp32_groups"] = weights
            zero["group_paddings"] = paddings
            zero["partition_count"] = [self.world_size] * len(weights)
            zero.pop("param_slice_mappings", None)  # for universal checkpoints only, which hold no state of ours
        return optim

    def _model_file(self, rank: int) -> dict[str, Any]:
        model = {**self.checkpoint.model_states[0], "dp_world_size": self.world_size}
        if self.checkpoint.stage < 3:
            return model
        whole = self.checkpoint.frozen_parameters()
        fragments = {}
        for name, shape in (model["frozen_param_shapes"] or {}).items():
            share = zero3_share(shape, self.world_size)
            padded = torch.nn.functional.pad(
                whole[plain_fqn(name)].flatten(), (0, share * self.world_size - shape.numel())
            )
            fragments[name] = padded[rank * share : (rank + 1) * share].clone()
        model["frozen_param_fragments"] = fragments
        return model

    @property
    def _weights_dtype(self) -> torch.dtype:
        return self.checkpoint.shards[0][0].weights.dtype

    def _groups(self) -> Iterator[tuple[dict[str, tuple[int, ...]], MicroAdamConfig]]:
        """Name -> shape of the parameters of every param group, in the order in which DeepSpeed lays them out."""
        for group in self.checkpoint.param_groups:
            tensors = [[shards[index] for shards in self.checkpoint.shards] for index in group["params"]]
            shapes = {fqn: shape for ranks in tensors for fqn, shape in self._ordered_shapes(ranks)}
            yield shapes, tensors[0][0].layout.config

    def _ordered_shapes(self, ranks: Sequence[SourceShard]) -> list[tuple[str, tuple[int, ...]]]:
        begins: dict[tuple[str, tuple[int, ...]], int] = {}
        # Where a parameter begins: in the rank's own shard (stage 3), or in the buffer that was cut (stages 1 and 2).
        # The first rank has no padding unless all others are padding only, so its length is the length of each part.
        for rank, shard in enumerate(ranks):
            for span in shard.layout.spans:
                begin = span.offset
                if self.checkpoint.stage < 3:
                    begin += rank * ranks[0].weights.numel() - span.start
                begins.setdefault((span.fqn, span.global_shape), begin)
        return sorted(begins, key=lambda parameter: begins[parameter])

    def _shards(self, rank: int) -> Iterator[tuple[FlatShard, MicroAdamConfig]]:
        """The local tensors of one rank."""
        for shapes, config in self._groups():
            if self.checkpoint.stage < 3:
                yield zero12_shard(shapes, self.world_size, rank), config
            else:
                for sub_group in self._sub_groups(shapes):
                    yield zero3_shard(sub_group, self.world_size, rank), config

    def _sub_groups(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
        """A sub-group is full when it holds ``sub_group_size`` elements on a rank."""
        sub_group: dict[str, tuple[int, ...]] = {}
        for fqn, shape in shapes.items():
            sub_group[fqn] = shape
            if sum(zero3_share(member, self.world_size) for member in sub_group.values()) >= self.sub_group_size:
                yield sub_group
                sub_group = {}
        if sub_group:
            yield sub_group

    def _param_groups(self) -> list[dict[str, Any]]:
        """The saved groups with the indices of the new tensors."""
        groups, index = [], 0
        for saved, (shapes, _) in zip(self.checkpoint.param_groups, self._groups(), strict=True):
            count = 1 if self.checkpoint.stage < 3 else len(list(self._sub_groups(shapes)))
            groups.append({**saved, "params": list(range(index, index + count))})
            index += count
        return groups


def _save(content: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, which does not say that it is the disk.

    Raises:
        OSError: It cannot be written.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        full = shutil.disk_usage(path.parent).free < 1 << 20
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(errno.EIO, str(error)) from error


def _num_bytes(layout: StateLayout, numel: int, dtype: torch.dtype) -> int:
    return layout.sparse_bytes + layout.dense_bytes + numel * dtype.itemsize


def _file_tensor(path: Path, numel: int, dtype: torch.dtype) -> Tensor:
    """A zeroed tensor in a file, so that its memory can be reclaimed.

    Raises:
        OSError: There is no room for it.
    """
    if numel == 0:
        return torch.zeros(0, dtype=dtype)
    if sys.platform == "linux":  # elsewhere only `_require_room` has looked
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
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
            differing = _differences(shard, resharder, rebuilt, Path(scratch))
        if differing:
            raise CheckpointMismatchError(
                f"verification failed: {', '.join(differing)} of {shard.origin} cannot be read back from what was "
                "written. Nothing was left behind; check the disk and try again."
            )
    progress("verifying", len(shards), len(shards))


def _differences(
    shard: SourceShard, resharder: Resharder, rebuilt: Sequence[tuple[str, int, int]], scratch: Path
) -> list[str]:
    """The tensors of a shard of the source that are not the same when they are cut from what was written."""
    weights = _file_tensor(scratch / "weights", shard.weights.numel(), shard.weights.dtype)
    weights.copy_(shard.weights)  # the padding
    resharder.weights(shard.layout, weights)
    state = resharder.state(shard.layout, _allocator(scratch / "state"))
    assert shard.state is not None and state is not None  # neither was saved before the first step
    ignored = _StateMask(shard.layout, [*rebuilt, *resharder.rebuilt])
    differing = [] if same_bits(weights, shard.weights) else ["weights"]
    return differing + [name for name in state if not ignored.equal(name, state[name], shard.state[name])]


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
        return same_bits(got, expected)
