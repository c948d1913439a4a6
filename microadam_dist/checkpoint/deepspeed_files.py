"""Finds and opens the files that DeepSpeed's `save_checkpoint` wrote; see `deepspeed` for their names."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointMismatchError, UnsupportedLayoutError
from .integrity import require_intact_pickle

_OPTIM_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
EXPERT_FILE = re.compile(r"(?:layer_\d+_expert|expp_rank)_(\d+)_mp_rank_(\d+)_(?:model|optim)_states\.pt")
EXPERT_OPTIM_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_TENSOR_PARALLEL_FILE = re.compile(r".*mp_rank_0*[1-9]\d*_(?:model|optim)_states\.pt")
_OF_RANKS = (_OPTIM_FILE, _MODEL_FILE, EXPERT_FILE)


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
            with in_file(latest):
                tag = latest.read_text().strip()
                (root / tag).is_dir()  # raises if it is no name
        _require_data_parallel(root / tag)
        files = cls(root / tag, *(files_by_rank(root / tag, pattern) for pattern in (_MODEL_FILE, _OPTIM_FILE)))
        if not files.model:
            raise CheckpointMismatchError(
                f"{files.folder} holds no *_model_states.pt: it is no DeepSpeed checkpoint, or not all of it. Copy it "
                "again, or give another tag."
            )
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


def files_by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of ranks 0, 1, ... in order."""
    files = {}
    for path in sorted(folder.glob("*.pt")):
        if match := pattern.fullmatch(path.name):
            files[int(match[1] or 0)] = path
    for rank in range(max(files, default=0)):
        if rank not in files:
            example = next(iter(files.values())).name
            raise CheckpointMismatchError(
                f"in {folder} the file like {example} of rank {rank} is missing. Copy it there."
            )
    return [files[rank] for rank in sorted(files)]


# What DeepSpeed 0.19.8 itself puts into its files, beside plain values and tensors.
_DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


@functools.cache
def _deepspeed_classes() -> list[Any]:
    """Those classes, as far as this DeepSpeed has them."""
    found = []
    for module, names in _DEEPSPEED_CLASSES.items():
        with contextlib.suppress(ImportError):
            classes = importlib.import_module(module)
            found += [getattr(classes, name) for name in names if hasattr(classes, name)]
    return found


def load_file(path: Path) -> Mapping[str, Any]:
    """What is in a file; its tensors are compared with their checksums by `require_intact` only.

    Raises:
        CheckpointMismatchError: It cannot be read, or is the file of another rank, which could pass for this one's.
    """
    written = require_intact_pickle(path)
    if written != path.stem and any(pattern.fullmatch(f"{written}.pt") for pattern in _OF_RANKS):
        raise CheckpointMismatchError(
            f"{path} was written as {written}.pt: files have been exchanged or renamed. Copy the checkpoint again."
        )
    try:
        with torch.serialization.safe_globals(_deepspeed_classes()):
            if others := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise CheckpointMismatchError(
                    f"{path} holds objects of {', '.join(others)}, which may run code and are not loaded. Use plain "
                    "values and tensors as client state, or allow them with torch.serialization.add_safe_globals."
                )
            states: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointMismatchError:
        raise
    except Exception as error:
        raise CheckpointMismatchError(
            f"{path} cannot be read, it is truncated or no checkpoint: {error}. Copy it again, or load an earlier one."
        ) from error
    if not isinstance(states, Mapping):
        raise CheckpointMismatchError(f"{path} is no checkpoint: it holds a {type(states).__name__}. Copy it again.")
    return states


@contextlib.contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Errors about what was read say where; what is not where DeepSpeed puts it is a CheckpointMismatchError, too."""
    try:
        yield
    except CheckpointMismatchError as error:
        raise error if str(path) in str(error) else CheckpointMismatchError(f"{path}: {error}") from error
    except UnsupportedLayoutError:
        raise  # of the optimizer here
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f"{path} is no checkpoint of DeepSpeed and MicroAdam that this version can read: {error!r}. "
            "Load an earlier one."
        ) from error
