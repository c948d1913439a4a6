"""Reads checkpoints of Hugging Face's Trainer, whichever engine trained: weights and state by (parameter, interval).

global_step<n>/, latest                      DeepSpeed
model.safetensors, optimizer.pt              one process, DDP
model.safetensors, microadam_state/          DDP with shard_state
pytorch_model_fsdp_0/, microadam_state/      FSDP1
pytorch_model_fsdp_0/, optimizer_0/          FSDP2
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.state import flatten_state
from ..config import LATER_SETTINGS, MicroAdamConfig
from ..errors import CheckpointMismatchError
from ..layout import ShardSpan, StateLayout, are_positions, plain_fqn
from .dcp import SavedState, load_entries, load_intact_entries, read_metadata, require_intact_entries
from .deepspeed import read_checkpoint
from .deepspeed_files import in_file
from .format import LAYOUT_KEY, read_layouts
from .integrity import require_intact
from .match import match_description, match_names, match_shapes
from .reshard import Resharder, SourceShard
from .training import SavedTraining

STATE_FOLDER = "microadam_state"
_FSDP_WEIGHTS = "pytorch_model_fsdp"


def engine_of(folder: Path) -> str:
    """What wrote a Trainer checkpoint: "DeepSpeed", "FSDP1", "FSDP2" or "DDP", which includes one process."""
    if any(folder.glob("global_step*")):
        return "DeepSpeed"
    if any(folder.glob(f"{_FSDP_WEIGHTS}*")):
        return "FSDP1" if (folder / STATE_FOLDER).is_dir() else "FSDP2"
    return "DDP"


def read_training(folder: str | Path, share: tuple[int, int] = (0, 1)) -> SavedTraining:
    """Open a checkpoint of Trainer.

    Args:
        folder: ``checkpoint-<step>``.
        share: See `read_checkpoint`.

    Raises:
        CheckpointMismatchError: Names the file that is missing, damaged or not ours.
    """
    folder = Path(folder)
    engine = engine_of(folder)
    with in_file(folder):
        if engine == "DeepSpeed":
            return read_checkpoint(folder, share=share).training()
        weights = _fsdp_weights(folder, share) if engine.startswith("FSDP") else _whole_weights(folder)
        scheduler = _load(folder / "scheduler.pt")
        if (folder / STATE_FOLDER).is_dir():
            saved = SavedState(folder / STATE_FOLDER)
            return SavedTraining(folder, engine, weights, saved.states, saved.param_groups, scheduler)
        sources, groups = (
            _fsdp2_state(folder, weights.shapes) if engine == "FSDP2" else _plain_state(folder / "optimizer.pt")
        )
        return SavedTraining(folder, engine, weights, Resharder(sources).states, groups, scheduler)


class WholeTensors:
    """Tensors that were saved whole, each read when it is asked for.

    Args:
        shapes: Of all, by the names under which they are found.
        read: Reads one.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self._stored_names = {plain_fqn(name): name for name in shapes}
        self._shapes = {plain_fqn(name): shape for name, shape in shapes.items()}
        self._read = read

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `SavedWeights`."""
        return self._shapes

    def whole(self, fqn: str) -> Tensor:
        """See `SavedWeights`."""
        return self._read(self._stored_names[fqn])

    def weights(self, layout: StateLayout, out: Tensor) -> None:
        """See `SavedWeights`."""
        for span in layout.spans:
            part = self.whole(span.fqn).reshape(-1)[span.start : span.start + span.numel]
            out[span.offset : span.offset + span.numel].copy_(part)


def _whole_weights(folder: Path) -> WholeTensors:
    """`model.safetensors`, in one file or several."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    elif (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    else:
        raise CheckpointMismatchError(f"{folder} has no weights that this version can read: no model.safetensors.")
    files: dict[str, Any] = {}  # by tensor
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(names):
        try:
            file: Any = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointMismatchError(
                f"{folder / name} cannot be read, it is missing or truncated: {error}. Copy it again."
            ) from error
        files |= dict.fromkeys(file.keys(), file)
        shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return WholeTensors(shapes, lambda name: files[name].get_tensor(name))


def _fsdp_weights(folder: Path, share: tuple[int, int]) -> WholeTensors:
    """`pytorch_model_fsdp_0/`, which `torch.distributed.checkpoint` wrote; checked here, read a tensor at a time."""
    (weights,) = (path for path in folder.glob(f"{_FSDP_WEIGHTS}*") if path.is_dir())
    metadata = read_metadata(weights).state_dict_metadata
    require_intact_entries(weights, metadata, share)
    shapes = {
        name.removeprefix("model."): (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }

    def read(name: str) -> Tensor:
        shape, dtype = shapes[name]
        tensor: Tensor = load_intact_entries(weights, {f"model.{name}": torch.empty(shape, dtype=dtype)})[
            f"model.{name}"
        ]
        return tensor

    return WholeTensors({name: shape for name, (shape, _) in shapes.items()}, read)


def _plain_state(path: Path) -> tuple[list[SourceShard], Sequence[Mapping[str, Any]]]:
    """`optimizer.pt` of one process or DDP: MicroAdam's own state dict."""
    saved = _load(path)
    if saved is None:
        raise CheckpointMismatchError(
            f"{path} is missing: the checkpoint was saved without the optimizer. Load its weights alone."
        )
    if LAYOUT_KEY not in saved:
        raise CheckpointMismatchError(f"{path} has no MicroAdam state: it was written with another optimizer.")
    layouts = read_layouts(saved[LAYOUT_KEY])
    if are_positions([span.fqn for layout in layouts.values() for span in layout.spans]):
        raise CheckpointMismatchError(
            f"{path} has positions in the place of names, which another engine has in another order. Resume with the "
            "engine that wrote it, or with ShardedStateMixin from the start, which saves names."
        )
    match_description(saved, layouts)
    sources = []
    for index, layout in layouts.items():
        state, name = saved["state"].get(index), layout.spans[0].fqn
        match_names(state, layout, name)
        match_shapes(state, layout, name)
        own = {part: state[part] for part in ("step", *layout.tensors)}
        sources.append(SourceShard(layout, flatten_state(own), torch.empty(0), str(path)))
    return sources, saved["param_groups"]


def _fsdp2_state(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[SourceShard], Sequence[Mapping[str, Any]]]:
    """`optimizer_0/`: one row of state for each row of a parameter, hence the state of one process."""
    (state,) = folder.glob("optimizer_*")
    metadata = read_metadata(state).state_dict_metadata
    wanted: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else ""
        for key, entry in metadata.items()
    }
    loaded = load_entries(state, wanted)
    groups: list[dict[str, Any]] = []
    while members := {
        key.removeprefix(prefix): value
        for key, value in loaded.items()
        if key.startswith(prefix := f"optimizer.param_groups.{len(groups)}.")
    }:
        groups.append(members)
    sources = []
    for group in groups:
        config = MicroAdamConfig.from_dict({**LATER_SETTINGS, **group})
        for name in group["params"]:
            layout = StateLayout((ShardSpan.whole(plain_fqn(name), shapes[plain_fqn(name)]),), config)
            keys = {part: f"optimizer.state.{name}.{part}" for part in ("step", *layout.tensors)}
            stepped = keys["step"] in loaded
            found = flatten_state({part: loaded[key] for part, key in keys.items()}) if stepped else None
            sources.append(SourceShard(layout, found, torch.empty(0), str(state)))
    return sources, groups


def _load(path: Path) -> dict[str, Any] | None:
    """What `torch.save` has written; None where there is nothing."""
    if not path.is_file():
        return None
    require_intact(path, str(path))
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise CheckpointMismatchError(
            f"{path} cannot be read: {error}. Copy it again, or load an earlier checkpoint."
        ) from error
    return saved
