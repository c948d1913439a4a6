"""One training in one process: whole in a `MicroAdam`, or cut into what each of several ranks would hold and step.

The ranks have the layouts, backends and files of real ones, and nothing to say to each other: a gradient is given.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microadam_dist import MicroAdam, MicroAdamConfig, load_sharded, save_sharded
from microadam_dist.arithmetic.state import allocate_state, flatten_state
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.select import select_backend
from microadam_dist.checkpoint.dcp import LocalState, SavedState, write_state
from microadam_dist.checkpoint.format import describe_layouts, read_layouts
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from microadam_dist.checkpoint.training import SavedTraining
from microadam_dist.engines.cuts import FlatShard, row_shard, zero3_shard, zero12_shard
from microadam_dist.layout import ShardSpan, StateLayout
from microadam_dist.optimizer.training import load_training

Weights = dict[str, Tensor]


@dataclass
class Group:
    """A param group: names and shapes of its parameters, and all its settings."""

    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    @property
    def config(self) -> MicroAdamConfig:
        return MicroAdamConfig.from_dict(self.settings)

    def copy(self) -> Group:
        return Group(self.shapes, dict(self.settings))


@dataclass(frozen=True)
class Cut:
    """``"whole"``, ``"rows"`` as FSDP2 cuts, ``"zero1"`` or ``"zero3"``."""

    kind: str
    world_size: int = 1

    def shards(self, group: Group, rank: int) -> list[FlatShard]:
        """The local tensors of a param group."""
        if self.kind == "rows":
            return [row_shard(name, shape, self.world_size, rank) for name, shape in group.shapes.items()]
        flat = zero12_shard if self.kind == "zero1" else zero3_shard
        return [flat(group.shapes, self.world_size, rank)]

    def edges(self, group: Group) -> list[tuple[str, int]]:
        """Where it cuts parameters: before which elements."""
        ranks = range(self.world_size) if self.kind != "whole" else ()
        spans = [span for rank in ranks for shard in self.shards(group, rank) for span in shard.spans]
        return [(span.fqn, edge) for span in spans for edge in (span.start, span.start + span.numel)]


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        cut: Of the training that wrote it.
        groups: Its param groups.
        weights: The model's whole weights, as a model's own checkpoint has them.
        files: What each rank has written with `torch.save`; none if it is a folder.
        folder: What `save_sharded` has written.
    """

    cut: Cut
    groups: list[Group]
    weights: Weights
    files: list[bytes]
    folder: Path | None

    def read(self, rank: int = 0) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.files[rank]), weights_only=True)

    def sources(self) -> list[SourceShard]:
        """All local tensors, from the files of the ranks."""
        sources = []
        for rank in range(len(self.files)):
            saved = self.read(rank)
            for index, layout in read_layouts(saved["microadam"]).items():
                state = flatten_state(saved["state"][index]) if index in saved["state"] else None
                if self.cut.kind == "whole":
                    weights = self.weights[layout.spans[0].fqn].flatten()
                else:
                    weights = saved["weights"][index]
                sources.append(SourceShard(layout, state, weights, f"rank {rank}"))
        known = {span.fqn for source in sources for span in source.layout.spans}
        for group in self.groups:  # a state dict does not speak of parameters that were never stepped
            for name, shape in group.shapes.items():
                if name not in known:
                    layout = StateLayout((ShardSpan.whole(name, shape),), group.config)
                    sources.append(SourceShard(layout, None, self.weights[name].flatten(), "never stepped"))
        return sources


class Model(nn.Module):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


class Whole:
    """In one process."""

    cut = Cut("whole")

    def __init__(self, weights: Weights, groups: Sequence[Group], backend: str) -> None:
        self.model = Model(weights)
        named = dict(self.model.named_parameters())
        given = [{**g.settings, "params": [(name, named[name]) for name in g.shapes]} for g in groups]
        self.optimizer = MicroAdam(given, backend=backend)

    def add_group(self, weights: Weights, group: Group) -> None:
        for name, tensor in weights.items():
            self.model.register_parameter(name, nn.Parameter(tensor.clone()))
        params = [(name, self.model.get_parameter(name)) for name in group.shapes]
        self.optimizer.add_param_group({**group.settings, "params": params})

    def set(self, index: int, **settings: Any) -> None:
        self.optimizer.param_groups[index].update(settings)

    def step(self, grads: Mapping[str, Tensor]) -> int:
        for name, p in self.model.named_parameters():
            p.grad = grads.get(name)
        before = self.optimizer.num_nonfinite_blocks
        self.optimizer.step()
        return self.optimizer.num_nonfinite_blocks - before

    def shards(self) -> list[SourceShard]:
        """What lies in ``optimizer.state``, nothing else asked."""
        found = []
        for group in self.optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                layout = StateLayout((ShardSpan.whole(name, tuple(p.shape)),), MicroAdamConfig.from_dict(group))
                state = flatten_state(self.optimizer.state[p]) if p in self.optimizer.state else None
                found.append(SourceShard(layout, state, p.detach().flatten(), "optimizer"))
        return found

    def settings(self) -> list[MicroAdamConfig]:
        return [MicroAdamConfig.from_dict(group) for group in self.optimizer.param_groups]

    def save(self, groups: Sequence[Group], folder: Path | None) -> Saved:
        files = []
        if folder is None:
            buffer = io.BytesIO()
            torch.save(self.optimizer.state_dict(), buffer)
            files.append(buffer.getvalue())
        else:
            save_sharded(self.optimizer, folder)
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return Saved(self.cut, [group.copy() for group in groups], weights, files, folder)

    def load(self, saved: Saved) -> None:
        if saved.folder is not None:
            load_sharded(self.optimizer, saved.folder)
            self.model.load_state_dict(saved.weights)
        elif saved.cut.kind == "whole":
            self.optimizer.load_state_dict(saved.read())
            self.model.load_state_dict(saved.weights)
        else:
            resharder = Resharder(saved.sources())
            groups = [group.settings for group in saved.groups]
            training = SavedTraining(Path("files"), str(saved.cut), resharder, resharder.states, groups, None)
            load_training(self.model, self.optimizer, lambda rank: training)


@dataclass
class LocalTensor:
    """What a rank holds of some parameters: flat, padding and all."""

    group: int
    layout: StateLayout
    weights: Tensor
    state: dict[str, Tensor] | None = None


class Ranks:
    """On several ranks; like an engine that shards, each steps what it holds."""

    def __init__(self, cut: Cut, weights: Weights, groups: Sequence[Group], backend: str) -> None:
        self.cut, self._backend = cut, select_backend(backend)
        self._groups: list[Group] = []
        self.ranks: list[list[LocalTensor]] = [[] for _ in range(cut.world_size)]
        for group in groups:
            self.add_group(weights, group)

    def add_group(self, weights: Weights, group: Group) -> None:
        self._groups.append(group.copy())
        for rank, tensors in enumerate(self.ranks):
            for shard in self.cut.shards(group, rank):
                layout = StateLayout(shard.spans, group.config)
                local = _cut_out(layout, weights, torch.full((shard.numel,), math.nan, dtype=_dtype(weights)))
                tensors.append(LocalTensor(len(self._groups) - 1, layout, local))

    def set(self, index: int, **settings: Any) -> None:
        self._groups[index].settings.update(settings)

    def step(self, grads: Mapping[str, Tensor]) -> int:
        num_skipped = 0
        for tensors in self.ranks:
            for index, group in enumerate(self._groups):
                members = [t for t in tensors if t.group == index and not grads.keys().isdisjoint(group.shapes)]
                members = [t for t in members if all(span.fqn in grads for span in t.layout.spans)]
                for t in members:
                    t.state = t.state or {"step": torch.tensor(0), **allocate_state(t.layout, torch.device("cpu"))}
                steps = [
                    TensorStep(
                        t.weights,
                        _cut_out(t.layout, grads, torch.full_like(t.weights, math.nan)),
                        t.state,
                        t.layout,
                        int(t.state["step"]),
                        counter=t.state["step"],
                    )
                    for t in members
                    if t.state is not None
                ]
                num_skipped += int(self._backend.step(steps, group.config, 1.0))
        return num_skipped

    def shards(self) -> list[SourceShard]:
        return [
            SourceShard(t.layout, t.state, t.weights, f"rank {rank}")
            for rank, tensors in enumerate(self.ranks)
            for t in tensors
        ]

    def settings(self) -> list[MicroAdamConfig]:
        return [group.config for group in self._groups]

    def save(self, groups: Sequence[Group], folder: Path | None) -> Saved:
        files = []
        if folder is not None:  # all ranks' parts in one call, which gives the same file
            tensors = [LocalState(t.layout, t.state) for tensors in self.ranks for t in tensors]
            settings = [{k: v for k, v in g.settings.items() if k not in g.config.structural} for g in groups]
            write_state(folder, tensors, settings, self.cut.world_size)
        else:
            files = [self._file(rank) for rank in range(self.cut.world_size)]
        resharder = Resharder(self.shards())
        weights = {name: resharder.whole(name) for name in resharder.shapes}
        return Saved(self.cut, [group.copy() for group in groups], weights, files, folder)

    def _file(self, rank: int) -> bytes:
        tensors = dict(enumerate(self.ranks[rank]))
        layouts = {index: t.layout for index, t in tensors.items()}
        buffer = io.BytesIO()
        content = {
            "state": {index: t.state for index, t in tensors.items() if t.state is not None},
            "weights": {index: t.weights for index, t in tensors.items()},
            "microadam": describe_layouts(layouts, rank, self.cut.world_size),
        }
        torch.save(content, buffer)
        return buffer.getvalue()

    def load(self, saved: Saved) -> None:
        locals_ = [t for tensors in self.ranks for t in tensors]
        layouts = [t.layout for t in locals_]
        weights = [t.weights.clone() for t in locals_]
        if saved.folder is not None:
            states = SavedState(saved.folder).states(layouts)
            for layout, local in zip(layouts, weights, strict=True):
                _cut_out(layout, saved.weights, local)
        else:
            resharder = Resharder(saved.sources())
            states = resharder.states(layouts)
            for layout, local in zip(layouts, weights, strict=True):
                resharder.weights(layout, local)
        for t, local, state in zip(locals_, weights, states, strict=True):
            t.weights, t.state = local, state
        self._groups = [group.copy() for group in saved.groups]


def start(cut: Cut, weights: Weights, groups: Sequence[Group], backend: str) -> Whole | Ranks:
    """A training that has not stepped."""
    return Whole(weights, groups, backend) if cut.kind == "whole" else Ranks(cut, weights, groups, backend)


def _cut_out(layout: StateLayout, full: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """Fill the spans of a local tensor."""
    for span in layout.spans:
        out[span.offset : span.offset + span.numel] = full[span.fqn].flatten()[span.start : span.start + span.numel]
    return out


def _dtype(weights: Weights) -> torch.dtype:
    return next(iter(weights.values())).dtype
