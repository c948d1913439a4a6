"""Which checkpoint a run goes on from, whether it is of the same run, and what a new run would overwrite.

Imports neither torch nor transformers, as `options`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .json_files import read_json
from .options import Options, Override

COMPLETE = "complete"
SETTINGS_FILE = "run_settings.json"
_FINAL = ("metrics.json", "trainer_state.json", "*.safetensors", "*.safetensors.index.json")


def find_checkpoint(options: Options) -> Path | None:
    """Checkpoint folder to resume from; None to start anew.

    Raises:
        UserError: there is none, the run is finished, or a new run would overwrite another one.
    """
    if options.resume == "last":
        return _last_checkpoint(options)
    if options.resume is None:
        _require_unused(options)
        return None
    checkpoint = Path(options.resume)
    if not (checkpoint / "trainer_state.json").is_file():
        raise UserError(f"--resume {options.resume}: no checkpoint found (was the run started with --save-steps?)")
    if not has_steps_left(checkpoint, options.steps):
        raise UserError(f"--resume {options.resume}: that run is finished; give more --steps to go on")
    if checkpoint.resolve().parent != options.output.resolve():
        _require_unused(options)
    elif options.overwrite:
        raise UserError(f"--overwrite would remove --resume {options.resume}: drop it, or choose another --output")
    return checkpoint


def _last_checkpoint(options: Options) -> Path | None:
    """The newest one that every rank has finished and that has steps left."""
    found = [path.parent for path in options.output.glob(f"checkpoint-*/{COMPLETE}")]
    for checkpoint in sorted(filter(_number, found), key=_number, reverse=True):
        if has_steps_left(checkpoint, options.steps):
            return checkpoint
    if found or (options.output / "metrics.json").exists():
        raise UserError(
            f"--resume last: the run in {options.output} is finished, and no checkpoint in it has steps left. Give "
            "more --steps to go on from a checkpoint, or drop --resume last and choose another --output, or --overwrite"
        )
    return None


def _number(checkpoint: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else 0


def has_steps_left(checkpoint: Path, num_steps: int | None) -> bool:
    """Whether a run of ``num_steps`` (None: of as many as before) goes on after a checkpoint.

    Trainer takes one more step when it is resumed from the last one.

    Raises:
        UserError: the checkpoint is damaged.
    """
    done, planned = progress(checkpoint)
    return done < (num_steps or planned)


def progress(checkpoint: Path) -> tuple[int, int]:
    """Steps that are done, and steps that were planned.

    Raises:
        UserError: the checkpoint is damaged.
    """
    file = checkpoint / "trainer_state.json"
    state = read_json(file)
    numbers = [state.get(name) for name in ("global_step", "max_steps")]
    if not all(isinstance(number, int) for number in numbers):
        raise UserError(
            f"{file} is damaged: it does not say how many steps are done. Resume from an earlier checkpoint"
        )
    return numbers[0], numbers[1]


def _require_unused(options: Options) -> None:
    """Raises a UserError if there are results of another run where those of this one would be."""
    used = _results(options.output)
    if used and not options.overwrite:
        raise UserError(
            f"--output {options.output} holds another run ({', '.join(path.name for path in used[:3])}): go on with it "
            "with --resume last, choose another folder, or remove it with --overwrite"
        )
    if options.model and any(Path(options.model).resolve().is_relative_to(path.resolve()) for path in used):
        raise UserError(f"--overwrite would remove --model {options.model}: choose another --output")
    if options.model and used and Path(options.model).resolve() == options.output.resolve():
        raise UserError(f"--overwrite would remove --model {options.model}: choose another --output")


def _results(output: Path) -> list[Path]:
    """What a run has left in its folder, but for logs."""
    checkpoints = [path for path in output.glob("checkpoint-*") if _number(path)]
    return sorted(checkpoints) + [path for pattern in _FINAL for path in sorted(output.glob(pattern))]


def remove_results(output: Path) -> None:
    """What `--overwrite` stands for."""
    for path in _results(output):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def run_settings(options: Options, params: Mapping[str, Any], kind: str, samples: int) -> dict[str, Any]:
    """What a run is started with, as it is written into its checkpoints; what it trains on comes later.

    Args:
        options: Resolved.
        params: Of the optimizer, defaults among them.
        kind: Of optimizer.
        samples: Of a step, on all ranks.
    """
    model = str(options.model_config or options.model)
    settings = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "seq_len": options.seq_len,
        "batch": samples,
        "seed": options.seed,
        "schedule": options.schedule,
        "warmup": options.warmup,
        "optimizer": kind,
        **params,
    }
    return json.loads(json.dumps(settings))  # as they are read


def require_same(checkpoint: Path, settings: Mapping[str, Any], overrides: list[Override]) -> bool:
    """Compare the settings of a run with those in the checkpoint that it goes on from.

    Returns:
        Whether the checkpoint has any; one of an older version has none.

    Raises:
        UserError: They contradict each other.
    """
    if not (checkpoint / SETTINGS_FILE).is_file():
        return False
    saved = read_json(checkpoint / SETTINGS_FILE)
    may_change = {override.name for override in Override}
    differing = [name for name in settings if name in saved and _differ(name, saved[name], settings[name])]
    refused = [name for name in differing if name not in {override.name for override in overrides}]
    if not refused:
        return True
    values = "; ".join(f"{name} {saved[name]}, this run {settings[name]}" for name in refused)
    changeable = " ".join(f"--override {Override[name].value}" for name in refused if name in may_change)
    fixed = ", ".join(name for name in refused if name not in may_change)
    raise UserError(
        f"{checkpoint} was saved with {values}. Give what it was saved with"
        + (f", or add {changeable} if the change is meant" if changeable else "")
        + (f"; {fixed} cannot change within a run" if fixed else "")
    )


def _differ(name: str, saved: Any, given: Any) -> bool:
    if name == "data":  # the same text may lie elsewhere now
        saved, given = (str(text).rpartition(" ")[2] for text in (saved, given))
    return saved != given


def describe(checkpoint: Path, compared: bool) -> str:
    """What is resumed, in a line."""
    done, planned = progress(checkpoint)
    if not compared:
        return f"Going on from {checkpoint}: {done} of {planned} steps done. Its settings were not saved, or compared."
    saved = read_json(checkpoint / SETTINGS_FILE)
    origin = f"saved by {saved.get('engine')} on {saved.get('ranks')} rank(s)"
    return f"Going on from {checkpoint}: {done} of {planned} steps done, lr {saved.get('lr')}, {origin}."
