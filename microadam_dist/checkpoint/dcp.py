"""Files of `torch.distributed.checkpoint` with the state of any intervals of any parameters.

    <parameter>|<start>-<end>|<name>   one flat state tensor of an interval, "step" among the names
    microadam                          JSON: {"format": 1, "world_size": W, "names": "model" or "positions",
                                              "param_groups": [...],
                                              "parameters": {<parameter>: {"shape": [...], "settings": {...}}}}

The keys say where in the parameter an interval lies, so that any other intervals can be cut from them, whatever engine
and number of ranks wrote them. Parameters are found by name. Where the names in the file are positions, they are found
by position, and there must be as many, of the same shapes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arithmetic.state import state_specs
from ..config import CHANGEABLE_SETTINGS
from ..errors import CheckpointMismatchError
from ..layout import ShardSpan, StateLayout, are_positions, plain_fqn
from .format import FORMAT, LAYOUT_KEY, read_settings
from .integrity import require_intact
from .match import require_settings
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
    header = {
        "format": FORMAT,
        "world_size": world_size,
        "names": "positions" if are_positions(list(parameters)) else "model",
        "param_groups": param_groups,
        "parameters": parameters,
    }
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
        self._folder = folder
        with _in_folder(folder):
            self._keys = list(read_metadata(folder).state_dict_metadata)
            self._read_header(json.loads(load_entries(folder, {LAYOUT_KEY: ""})[LAYOUT_KEY]))

    def _read_header(self, header: Mapping[str, Any]) -> None:
        if header["format"] != FORMAT:
            raise CheckpointMismatchError(
                f"{self._folder} has format {header['format']!r}, this version reads {FORMAT}. Load it with the "
                "version of microadam_dist that wrote it."
            )
        require_settings(header["param_groups"], CHANGEABLE_SETTINGS)
        self.param_groups: list[dict[str, Any]] = [
            {**group, "betas": tuple(group["betas"])} for group in header["param_groups"]
        ]
        self._parameters = {
            plain_fqn(name): (tuple(saved["shape"]), read_settings(saved["settings"]))
            for name, saved in header["parameters"].items()
        }
        self._stored_names = {plain_fqn(name): name for name in header["parameters"]}  # 0.1.0 kept DDP's "module."
        self._intervals: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for key in self._keys:
            if key != LAYOUT_KEY:
                fqn, interval, _ = key.rsplit("|", 2)
                start, end = map(int, interval.split("-"))
                self._intervals[plain_fqn(fqn)].add((start, end))

    def states(self, layouts: Sequence[StateLayout]) -> list[dict[str, Tensor] | None]:
        """State of local tensors with these layouts, flat, on the CPU; None for one that was never stepped.

        Args:
            layouts: Of all tensors in the param groups, in order.

        Raises:
            CheckpointMismatchError: A parameter is not there, or its shape or settings differ.
        """
        with _in_folder(self._folder):
            layouts = self._renamed(layouts)
            needed = [[source for span in layout.spans for source in self._overlapping(span)] for layout in layouts]
            wanted: dict[str, Any] = {}
            for source in {source for sources in needed for source in sources if self._is_stepped(source)}:
                wanted[self._key(source.spans[0], "step")] = torch.zeros((), dtype=torch.int64)
                for name, (dtype, numel) in state_specs(source).items():
                    wanted[self._key(source.spans[0], name)] = torch.empty(numel, dtype=dtype)
            load_entries(self._folder, wanted)
            return [
                Resharder(self._shards(sources, wanted)).state(layout)
                for layout, sources in zip(layouts, needed, strict=True)
            ]

    def others(self, layouts: Sequence[StateLayout]) -> list[str]:
        """Names of the parameters that have state in the folder and are in none of these layouts."""
        asked_for = {span.fqn for layout in self._renamed(layouts) for span in layout.spans}
        return sorted(self._intervals.keys() - asked_for)

    def _renamed(self, layouts: Sequence[StateLayout]) -> Sequence[StateLayout]:
        """The same layouts with the names that the parameters have in the file."""
        spans, saved = [span for layout in layouts for span in layout.spans], list(self._parameters)
        if not are_positions(saved):
            return layouts
        shapes, saved_shapes = [span.global_shape for span in spans], [shape for shape, _ in self._parameters.values()]
        if shapes != saved_shapes or len(layouts) != len(spans):  # flat shards are in an order of their own
            first = next((i for i, pair in enumerate(zip(shapes, saved_shapes, strict=False)) if pair[0] != pair[1]), 0)
            raise CheckpointMismatchError(
                f"parameters are found by position in {self._folder}, where there are {len(saved)}, {len(spans)} "
                f"here, of other shapes from position {first} on. It belongs to another model, or was "
                "saved with the parameters in another order: construct both with model.named_parameters()."
            )
        return [
            replace(layout, spans=(replace(layout.spans[0], fqn=name),))
            for layout, name in zip(layouts, saved, strict=True)
        ]

    def _overlapping(self, span: ShardSpan) -> list[StateLayout]:
        """The saved intervals an interval is cut from."""
        if span.fqn not in self._parameters:
            some = ", ".join(sorted(self._parameters)[:3])
            raise CheckpointMismatchError(
                f"parameter {span.fqn!r} is not in {self._folder}, which has {len(self._parameters)}, such as {some}. "
                "It belongs to another model, or the optimizers were given their parameters under different names: "
                "construct them with model.named_parameters()."
            )
        shape, config = self._parameters[span.fqn]
        whole = ShardSpan(span.fqn, shape, 0, 0)
        found = sorted(self._intervals[span.fqn]) or [(0, whole.global_numel)]
        overlapping = [(a, b) for a, b in found if a < span.start + span.numel and span.start < b]
        # An empty interval needs nothing but the step, which is the same in all of them.
        return [
            StateLayout((ShardSpan(whole.fqn, whole.global_shape, a, b - a),), config)
            for a, b in overlapping or [min(found, key=lambda interval: interval[1] - interval[0])]
        ]

    def _shards(self, sources: Iterable[StateLayout], loaded: Mapping[str, Tensor]) -> list[SourceShard]:
        shards = []
        for layout in sources:
            (span,) = layout.spans
            names = ("step", *layout.tensors)
            state = {name: loaded[self._key(span, name)] for name in names} if self._is_stepped(layout) else None
            shards.append(SourceShard(layout, state, torch.empty(0), str(self._folder)))
        return shards

    def _is_stepped(self, source: StateLayout) -> bool:
        (span,) = source.spans
        return (span.start, span.start + span.numel) in self._intervals[span.fqn]

    def _key(self, span: ShardSpan, name: str) -> str:
        return _key(self._stored_names[span.fqn], span, name)


def read_metadata(folder: str | Path) -> Any:
    """What a folder of `torch.distributed.checkpoint` says about its entries.

    Raises:
        CheckpointMismatchError: It is no such folder, or damaged.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not Path(folder, ".metadata").is_file():
        raise CheckpointMismatchError(
            f"{folder} is no folder that save_sharded or torch.distributed.checkpoint has written: it has no "
            ".metadata. Check the path, or copy it again with all its files."
        )
    with _in_folder(folder):
        return FileSystemReader(folder).read_metadata()


def load_entries(folder: str | Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Fill tensors, and replace other values, from such a folder; every rank reads what it needs.

    Raises:
        CheckpointMismatchError: An entry is missing, of another size, or not as it was written.
    """
    require_intact_entries(folder, wanted)
    return load_intact_entries(folder, wanted)


def load_intact_entries(folder: str | Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """`load_entries` of what `require_intact_entries` has accepted."""
    from torch.distributed.checkpoint.state_dict_loader import load

    with _in_folder(folder):
        load(wanted, checkpoint_id=folder, no_dist=True)
    return wanted


def require_intact_entries(folder: str | Path, names: Collection[str], share: tuple[int, int] = (0, 1)) -> None:
    """Compare entries with their checksums.

    Args:
        folder: Of `torch.distributed.checkpoint`.
        names: Of the entries.
        share: (rank, number of ranks) of those that compare, each some of them.

    Raises:
        CheckpointMismatchError: One is not as it was written.
    """
    metadata = read_metadata(folder)
    with _in_folder(folder):
        _require_disjoint(metadata, names)
        places = [(index.fqn, place) for index, place in metadata.storage_data.items() if index.fqn in names]
        for name, place in places[share[0] :: share[1]]:
            path = Path(folder, place.relative_path)
            with path.open("rb") as file:
                file.seek(place.offset)
                require_intact(io.BytesIO(file.read(place.length)), f"{name!r} in {path}")


def _require_disjoint(metadata: Any, names: Collection[str]) -> None:
    """What says where entries lie has no checksum: it is right if they fill each tensor, and no two share a place.

    Raises:
        ValueError: Two do, or a tensor is not filled.
    """
    files: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place in metadata.storage_data.values():
        files[place.relative_path].append((place.offset, place.offset + place.length))
    for name, places in files.items():
        if any(end > start for (_, end), (start, _) in itertools.pairwise(sorted(places))):
            raise ValueError(f"entries overlap in {name}")
    for name in names:
        entry = metadata.state_dict_metadata[name]
        chunks = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in getattr(entry, "chunks", ()))
        for (offsets, sizes), (next_offsets, _) in itertools.pairwise(chunks):
            if all(a <= b < a + n for a, b, n in zip(offsets, next_offsets, sizes, strict=True)):
                raise ValueError(f"parts of {name} overlap")
        for offsets, sizes in chunks:
            if any(a < 0 or n < 0 or a + n > m for a, n, m in zip(offsets, sizes, entry.size, strict=True)):
                raise ValueError(f"a part of {name} is outside of it")
        if chunks and sum(math.prod(sizes) for _, sizes in chunks) != math.prod(entry.size):
            raise ValueError(f"parts of {name} are missing")


@contextlib.contextmanager
def _in_folder(folder: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a folder is read is a CheckpointMismatchError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointMismatchError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is a BaseException, and contains tracebacks
        reason = str(error).strip().rpartition("\n")[2]
        raise CheckpointMismatchError(
            f"{folder} is damaged, or other software has written it: {type(error).__name__}: {reason}. Copy it again, "
            "or load an earlier one."
        ) from error


def _key(fqn: str, span: ShardSpan, name: str) -> str:
    return f"{fqn}|{span.start}-{span.start + span.numel}|{name}"
