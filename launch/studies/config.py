"""A study as YAML: optimizers x learning rates x seeds x tasks, and what identifies one run of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from training.errors import UserError

from .optimizers import BUILDERS


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pretraining(_Settings):
    """How the starting point of a fine-tuning task is made, once: AdamW, cosine schedule."""

    data: str = "stdlib"
    steps: int
    batch_size: int = 4
    lr: float = 2e-3


class TextTask(_Settings):
    """Next-byte prediction with a Llama.

    Attributes:
        data: ``stdlib``, ``python-reference``, ``torch-docstrings``, or a file or folder of your own: see `data`.
        model: Changes to configs/models/byte-llama-1m.json.
        pretrain: Without it the model starts from random weights.
        eval_sequences: At most so many validation, and so many test sequences.
        seeds, search_seeds: Instead of the study's.
        optimizers: Only these of the study's.
        trace_every: Also record norms of gradient and error feedback, and the state's bytes, every so many steps.
    """

    kind: Literal["text"]
    data: str
    model: dict[str, int] = {}
    pretrain: Pretraining | None = None
    seq_len: int = 256
    batch_size: int = 2
    steps: int
    eval_every: int
    eval_sequences: int = 64
    seeds: int | None = None
    search_seeds: int | None = None
    optimizers: list[str] | None = None
    trace_every: int | None = None


class DigitsTask(_Settings):
    """Handwritten digits, 8 x 8 pixels, from random weights; scikit-learn's bundled copy."""

    kind: Literal["digits"]
    model: Literal["cnn", "vit"]
    batch_size: int = 32
    steps: int
    eval_every: int
    seeds: int | None = None
    search_seeds: int | None = None
    optimizers: list[str] | None = None
    trace_every: int | None = None


Task = Annotated[TextTask | DigitsTask, Field(discriminator="kind")]
Rates = Annotated[list[float], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]


class OptimizerEntry(BaseModel):
    """An optimizer with one setting. Keys beside these go to its constructor.

    Attributes:
        type: A name in `optimizers.BUILDERS`.
        lr: Learning rates to begin with; see `Study.lr_factor`.
        warmup: Fraction of the steps in which the learning rate rises; a cosine to 0 follows.
        weights: Of the model; "bf16": no fp32 copy of them.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    type: Literal[tuple(BUILDERS)]  # type: ignore[valid-type]
    lr: Rates
    warmup: float = 0.05
    weights: Literal["fp32", "bf16"] = "fp32"

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor beside the learning rate."""
        return dict(self.model_extra or {})


class Study(_Settings):
    """Everything in the YAML file.

    Attributes:
        question: What the study is to find out; the first paragraph of its report.
        seeds: Runs at the best learning rate.
        search_seeds: Runs at every learning rate; the best one has the lowest mean validation loss.
        lr_factor: Neighbours of the best learning rate at this factor are added until the best lies inside the grid.
            None: the learning rates stay as given.
        baseline: The optimizer that differences are counted from.
        frontier: The bytes that losses are drawn against.
        device: Where all runs train. On a GPU fp32 matrices are multiplied in TF32.
        quick: What `--quick` changes, merged into all this.
    """

    title: str
    question: str
    seeds: int = 3
    search_seeds: int = 1
    lr_factor: float | None = 2.0
    baseline: str = "AdamW"
    frontier: Literal["state", "weights and state"] = "state"
    device: Literal["cpu", "cuda"] = "cpu"
    tasks: dict[str, Task]
    optimizers: dict[str, OptimizerEntry]
    quick: dict[str, Any] = {}


class Run(NamedTuple):
    """One training run."""

    task: str
    optimizer: str
    lr: float
    seed: int


def load_study(path: Path, *, quick: bool) -> Study:
    """Read and check a YAML file.

    Raises:
        UserError: It is not there, or is no study; says where.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected a mapping with title, question, tasks, optimizers")
        content = {name: value for name, value in content.items() if not name.startswith(".")}  # YAML anchors
        study = Study.model_validate(_merge(content, content.get("quick", {})) if quick else content)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r:.60})" for e in error.errors())
        raise UserError(f"{path}: " + "; ".join(problems)) from None
    named = {name for task in study.tasks.values() for name in task.optimizers or ()}
    if unknown := named - study.optimizers.keys():
        raise UserError(f"{path}: a task names optimizers that the study does not have: {', '.join(sorted(unknown))}")
    return study


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, mapping by mapping; ``all`` in a mapping changes each of its entries."""
    merged = dict(base)
    if "all" in changes:
        merged = {name: _merge(value, changes["all"]) for name, value in merged.items()}
    for name, value in changes.items():
        if name != "all":
            both_mappings = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = _merge(merged[name], value) if both_mappings else value
    return {name: value for name, value in merged.items() if value != "drop"}


def content_key(*parts: Any) -> str:
    """A short name for settings and data: two runs with the same one are the same run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cell_key(study: Study, task: str, optimizer: str, data_sha256: str) -> str:
    """Identifies task, data and optimizer, with all settings that can change a result."""
    settings = study.tasks[task].model_dump(exclude={"seeds", "search_seeds", "optimizers"})
    entry = study.optimizers[optimizer]
    device = [study.device] if study.device != "cpu" else []  # keys of old results have none
    return content_key(settings, data_sha256, entry.model_dump(exclude={"lr"}), *device)
