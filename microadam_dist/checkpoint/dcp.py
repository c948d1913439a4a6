"""Files of `torch.distributed.checkpoint` with the state of any intervals of any parameters.

    <parameter>|<start>-<end>|<name>   one flat state tensor of an interval, "step" among the names
    microadam                          JSON: {"format": 1, "world_size": W, "param_groups": [...],
                                              "parameters": {<parameter>: {"shape": [...], "settings": {...}}}}

The keys say where in the parameter an interval lies, so that any other intervals can be cut from them, whatever engine
and number of ranks wrote them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arithmetic.state import state_specs
from ..config import MicroAdamConfig
from ..errors import CheckpointMismatchError
from ..layout import ShardSpan, StateLayout, plain_fqn
from .format import FORMAT, LAYOUT_KEY
from .reshard import Resharder, SourceShard


class LocalState(NamedTuple):
    """A local tensor with one span, and its flat state tensors and ``step``; None before its first step."""

    layout: StateLayout
    state: Mapping[str, Tensor] | None


def write_state(
    folder: str | Path, tensors: Iterable[LocalState], param_groups: Sequence[Mapping[str, Any]], world_size: int
) -> None:
    """Save this rank's part; a collective of all ranks.

    Args:
        folder: New or empty.
        tensors: Everything in the param groups, stepped or not.
        param_groups: Their settings, of types that JSON has.
        world_size: Number of ranks, for messages.
    """
    saved: dict[str, Any] = {}
    parameters = {}
    for layout, state in tensors:
        (span,) = layout.spans
        parameters[span.fqn] = {"shape": span.global_shape, "settings": layout.config.structural}
        if state is not None and span.numel:
            saved |= {_key(span.fqn, span, name): state[name] for name in ("step", *layout.tensors)}
    header = {"format": FORMAT, "world_size": world_size, "param_groups": param_groups, "parameters": parameters}
    from torch.distributed.checkpoint.state_dict_saver import save

    save({**saved, LAYOUT_KEY: json.dumps(header)}, checkpoint_id=folder)


class SavedState:
    """A folder that `write_state` has filled.

    Args:
        folder: In a file system that every rank reads.

    Attributes:
        param_groups: As they were given to `write_state`.

    Raises:
        CheckpointMismatchError: It is no such folder, or of another format version.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        self._folder = folder
        try:
            keys = FileSystemReader(folder).read_metadata().state_dict_metadata
            header = json.loads(self._load({LAYOUT_KEY: ""})[LAYOUT_KEY])
        except Exception as error:
            raise CheckpointMismatchError(
                f"{folder} is no folder that save_sharded has written, or it is damaged: {error}"
            ) from error
        if header["format"] != FORMAT:
            raise CheckpointMismatchError(
                f"{folder} has format {header['format']!r}, this version reads {FORMAT}. Load it with the version of "
                "microadam_dist that wrote it."
            )
        self.param_groups: list[dict[str, Any]] = header["param_groups"]
        self._parameters: dict[str, Any] = {plain_fqn(name): saved for name, saved in header["parameters"].items()}
        self._stored_names = {plain_fqn(name): name for name in header["parameters"]}  # 0.1.0 kept DDP's "module."
        self._intervals: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for key in keys:
            if key != LAYOUT_KEY:
                fqn, interval, _ = key.rsplit("|", 2)
                start, end = map(int, interval.split("-"))
                self._intervals[plain_fqn(fqn)].add((start, end))

    def states(self, layouts: Sequence[StateLayout]) -> list[dict[str, Tensor] | None]:
        """State of local tensors with these layouts, flat, on the CPU; None for one that was never stepped.

        Raises:
            CheckpointMismatchError: A parameter is not there, or its shape or settings differ.
        """
        needed = {layout.spans[0]: self._overlapping(layout.spans[0]) for layout in layouts}
        wanted: dict[str, Tensor] = {}
        for source in {source for sources in needed.values() for source in sources}:
            wanted[self._key(source.spans[0], "step")] = torch.zeros((), dtype=torch.int64)
            for name, (dtype, numel) in state_specs(source).items():
                wanted[self._key(source.spans[0], name)] = torch.empty(numel, dtype=dtype)
        try:
            self._load(wanted)
        except Exception as error:
            raise CheckpointMismatchError(f"{self._folder} is damaged: {error}") from error
        return [Resharder(self._shards(needed[layout.spans[0]], wanted)).state(layout) for layout in layouts]

    def _overlapping(self, span: ShardSpan) -> list[StateLayout]:
        """The saved intervals an interval is cut from."""
        saved = self._parameters.get(span.fqn)
        if saved is None:
            some = ", ".join(sorted(self._parameters)[:3])
            raise CheckpointMismatchError(
                f"parameter {span.fqn!r} is not in {self._folder}, which has {len(self._parameters)}, such as {some}. "
                "It belongs to another model, or the optimizers were given their parameters under different names: "
                "construct them with model.named_parameters()."
            )
        whole = ShardSpan(span.fqn, tuple(saved["shape"]), 0, 0)
        found = sorted(self._intervals[span.fqn]) or [(0, whole.global_numel)]
        overlapping = [(a, b) for a, b in found if a < span.start + span.numel and span.start < b]
        config = MicroAdamConfig.from_dict(saved["settings"])
        # An empty interval needs nothing but the step, which is the same in all of them.
        return [
            StateLayout((ShardSpan(whole.fqn, whole.global_shape, a, b - a),), config)
            for a, b in overlapping or [min(found, key=lambda interval: interval[1] - interval[0])]
        ]

    def _shards(self, sources: Iterable[StateLayout], loaded: Mapping[str, Tensor]) -> list[SourceShard]:
        shards = []
        for layout in sources:
            (span,) = layout.spans
            stepped = (span.start, span.start + span.numel) in self._intervals[span.fqn]
            names = ("step", *layout.tensors)
            state = {name: loaded[self._key(span, name)] for name in names} if stepped else None
            shards.append(SourceShard(layout, state, torch.empty(0), str(self._folder)))
        return shards

    def _key(self, span: ShardSpan, name: str) -> str:
        return _key(self._stored_names[span.fqn], span, name)

    def _load(self, wanted: dict[str, Any]) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict_loader import load

        load(wanted, checkpoint_id=self._folder, no_dist=True)  # every rank reads what it needs
        return wanted


def _key(fqn: str, span: ShardSpan, name: str) -> str:
    return f"{fqn}|{span.start}-{span.start + span.numel}|{name}"
