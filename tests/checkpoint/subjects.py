"""What mutated checkpoints are made from, and what loads them: one engine of each kind, used again and again.

Loading a mutant may raise a CheckpointMismatchError that names a file or a parameter and what to do, and leave all as
it was; or load exactly what was saved. `Trainee.attempt` tells everything else.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

import microadam_dist
from microadam_dist import CheckpointMismatchError, load_sharded, save_sharded
from microadam_dist.arithmetic.state import flatten_state
from microadam_dist.checkpoint.dcp import load_entries, read_metadata
from microadam_dist.checkpoint.deepspeed_reshard import reshard_checkpoint
from microadam_dist.checkpoint.format import LAYOUT_KEY
from microadam_dist.checkpoint.trainer import STATE_FOLDER, read_training
from microadam_dist.optimizer.training import load_training
from tests.checkpoint.mutants import damage_content, damage_files
from tests.checkpoint.trainings import BLOCK_SIZE, LR, SHAPES, Plain, ShardedStateDDP, make_model, param_groups, values
from tests.deepspeed.engines import initialize, make_config

SAVED_AT, END = 2, 3  # steps; at the end is what a refused mutant has to leave alone
REMEDY = r"\b[Ll]oad|[Cc]opy|[Cc]onstruct|[Rr]esume|[Ss]tart|[Bb]uild|[Rr]emove|[Gg]ive|[Uu]se\b"
NAMED = r"/|MicroAdam state|param(eter|s| group)|'[\w.]+'"

Load = Callable[[Path], Any]


def same(a: Any, b: Any) -> bool:
    """Bit by bit, in nested dictionaries and lists."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (torch.equal(a, b) or _bits(a) == _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


def _bits(tensor: Tensor) -> list[int]:
    bits: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
    return bits


def names_remedy(message: str) -> bool:
    """Whether an error names a file or a parameter, and says what to do."""
    return bool(re.search(REMEDY, message) and re.search(NAMED, message))


class Trainee:
    """A model and its optimizer, which load mutants; trained on after what was saved."""

    saved: dict[str, Any]  # what there was then
    end: dict[str, Any]  # and what there is when a mutant is loaded

    def snapshot(self) -> dict[str, Any]:
        """Everything that loading may change, on this rank; copies."""
        raise NotImplementedError

    def weights(self, snapshot: dict[str, Any]) -> dict[str, Any]:
        """Those of a snapshot."""
        return {name: tensor for name, tensor in snapshot.items() if name.endswith(".weight")}

    def restore(self) -> None:
        """Back to the end of its training."""
        raise NotImplementedError

    def attempt(self, load: Callable[[], Any], *, loads_weights: bool = True) -> tuple[str, str]:
        """Load a mutant.

        Args:
            load: Does so.
            loads_weights: Whether there are weights in it.

        Returns:
            "refused" or "loaded", or else what is wrong; and an error's message.
        """
        message = ""
        try:
            load()
        except CheckpointMismatchError as error:
            outcome, message = "refused", str(error)
            if not names_remedy(message):
                outcome = "no file, parameter or remedy is named"
        except Exception as error:
            outcome, message = f"{type(error).__name__}", traceback.format_exc()
        else:
            outcome = "loaded"
        now = self.snapshot()
        expected = self.saved if loads_weights else {**self.saved, **self.weights(self.end)}
        if outcome == "loaded" and not same(now, expected):
            outcome = f"silently other: {[key for key in now if not same(now[key], expected.get(key))]}"
        elif outcome != "loaded" and not same(now, self.end):
            outcome += f", and half-loaded: {[key for key in now if not same(now[key], self.end.get(key))]}"
        return outcome, message


class Engine(Trainee):
    """DeepSpeed's, with a frozen parameter; saves to ``root`` / "good"."""

    def __init__(self, stage: int, dtype: torch.dtype, root: Path) -> None:
        model = make_model()
        model.frozen = nn.Linear(7, 3).requires_grad_(False)
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in param_groups(model)]
        extra = {"zero_optimization": {"sub_group_size": 3000}} if stage == 3 else {}
        config = make_config(stage, dtype, {"lr": LR, "block_size": BLOCK_SIZE}, **extra)
        self.engine, self.end_folder = initialize(model, config, model_parameters=groups), root / "end"
        for step in range(END):
            if step == SAVED_AT:
                self.engine.save_checkpoint(str(root / "good"), client_state={"epoch": 7})
                self.saved = self.snapshot()
            self.engine.backward(self.engine({name: values(name, step, dtype) for name in SHAPES}))
            self.engine.step()
        self.engine.save_checkpoint(str(self.end_folder))
        self.end = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        optimizer = self.engine.basic_optimizer
        found: dict[str, Any] = {"counters": [self.engine.global_steps, self.engine.global_samples]}
        for name, p in self.engine.module.named_parameters():
            part = getattr(p, "ds_tensor", p).detach().flatten()
            if hasattr(p, "ds_tensor"):  # what is behind them may be anything
                part = part[: max(0, p.ds_numel - dist.get_rank() * len(part))]
            found[f"{name} in the module"] = part.clone()
        for index, (p, layout) in enumerate(optimizer.sharded._layouts.items()):
            for span in layout.spans:  # what is between them may be anything
                part = p.detach().view(-1)[span.offset : span.offset + span.numel]
                found[f"{span.fqn} in tensor {index}"] = part.clone()
            found[f"state of tensor {index}"] = copy.deepcopy(flatten_state(optimizer.state[p]))
        groups = optimizer.param_groups
        return {**found, "settings": [{k: v for k, v in group.items() if k != "params"} for group in groups]}

    def load(self, folder: Path) -> None:
        """DeepSpeed's own."""
        if self.engine.load_checkpoint(str(folder))[0] is None:  # it says so only in this way
            raise CheckpointMismatchError(f"nothing to load in {folder}")

    def restore(self) -> None:
        microadam_dist.deepspeed.load_checkpoint(self.engine, self.end_folder)


class Process(Trainee):
    """One process, or ranks that share the state."""

    def __init__(self, training: Plain) -> None:
        self.training = training
        training.train(range(SAVED_AT))
        self.saved = self.snapshot()

    def train_on(self) -> None:
        """After it was saved."""
        self.training.train(range(SAVED_AT, END))
        self.end = self.snapshot()

    def snapshot(self) -> dict[str, Any]:
        optimizer = self.training.optimizer
        weights = {name: p.detach().clone() for name, p in self.training.model.named_parameters()}
        state = {
            f"state of tensor {index}": copy.deepcopy(flatten_state(optimizer.sharded.local(p)))
            for index, p in enumerate(optimizer.sharded._layouts)
        }
        ours = ("params", "param_names")  # names have no part in loading
        groups = [{k: v for k, v in group.items() if k not in ours} for group in optimizer.param_groups]
        return {**weights, **state, "settings": copy.deepcopy(groups)}

    def restore(self) -> None:
        optimizer = self.training.optimizer
        for index, p in enumerate(optimizer.sharded.layouts()):
            optimizer.sharded.load_shards({p: copy.deepcopy(self.end[f"state of tensor {index}"])})
        optimizer.sharded.load_group_settings(self.end["settings"])
        with torch.no_grad():
            for name, p in self.training.model.named_parameters():
                p.copy_(self.end[name])


class Subject:
    """A checkpoint, what loads it, and how.

    Attributes:
        good: The folder of the undamaged one.
        ways: Title -> what loads it, and how.
        has_weights: Whether it is a checkpoint of the model, too.
    """

    good: Path
    ways: dict[str, tuple[Trainee, Load]]
    has_weights = True

    def damage(self, chance: random.Random, folder: Path) -> str:
        """Make a copy a mutant; returns what was done."""
        raise NotImplementedError

    def rewrite(self, folder: Path) -> Path | str | None:
        """What `microadam reshard` writes for as many ranks, the same way to load it; or what is wrong."""
        return None


class DeepSpeedSubject(Subject):
    """Of ``engine.save_checkpoint``."""

    def __init__(self, stage: int, dtype: torch.dtype, root: Path) -> None:
        self.stage, self.good = stage, root / "good"
        engine = Engine(stage, dtype, root)
        self.ways = {
            "engine.load_checkpoint": (engine, engine.load),
            "load_checkpoint": (
                engine,
                lambda folder: microadam_dist.deepspeed.load_checkpoint(engine.engine, folder),
            ),
        }

    def damage(self, chance: random.Random, folder: Path) -> str:
        files = sorted(folder.glob("*/*.pt"))
        if chance.random() < 0.6:
            firsts = [path for path in files if "_rank_0_mp" in path.name]
            pairs = [(path, path.with_name(path.name.replace("_rank_0_mp", "_rank_1_mp"))) for path in firsts]
            return damage_files(chance, [*files, folder / "latest"], pairs)
        path = chance.choice(files)
        saved = torch.load(path, weights_only=False)
        done = damage_content(chance, saved)
        torch.save(saved, path)
        return f"{path.name}: {done}"

    def rewrite(self, folder: Path) -> Path | str | None:
        if self.stage == 0:
            return None
        target = folder.with_name(f"{folder.name}-resharded")
        try:
            reshard_checkpoint(folder, target, 2)
        except CheckpointMismatchError as error:
            left = [path.name for path in folder.parent.iterdir() if target.name in path.name]
            if left:
                return f"reshard left {left}"
            return None if names_remedy(str(error)) else f"reshard: {error}"
        except Exception:
            return f"reshard: {traceback.format_exc()}"
        return target


class ShardedSubject(Subject):
    """Of `save_sharded`, on 2 ranks that share the state; loaded by such ranks, and by processes with all of it."""

    has_weights = False

    def __init__(self, sharded: Process, whole: Process, good: Path) -> None:
        self.good = good
        save_sharded(sharded.training.optimizer, good)
        self.ways = {
            f"load_sharded, {title}": (process, functools.partial(load_sharded, process.training.optimizer))
            for title, process in (("as it was", sharded), ("whole", whole))
        }

    def damage(self, chance: random.Random, folder: Path) -> str:
        return _damage_sharded(chance, folder)


def _damage_sharded(chance: random.Random, folder: Path) -> str:
    files = [path for path in sorted(folder.iterdir()) if path.name != ".metadata"]
    if chance.random() < 0.6:
        return damage_files(chance, [*files, folder / ".metadata", folder / ".metadata"], [(files[0], files[-1])])
    metadata = read_metadata(folder).state_dict_metadata
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else ""
        for key, entry in metadata.items()
    }
    saved = load_entries(folder, wanted)
    saved[LAYOUT_KEY] = json.loads(saved[LAYOUT_KEY])
    done = damage_content(chance, saved)
    if LAYOUT_KEY in saved:
        saved[LAYOUT_KEY] = json.dumps(saved[LAYOUT_KEY], default=str)
    shutil.rmtree(folder)
    dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return done


class StateDictSubject(Subject):
    """Of ``torch.save(optimizer.state_dict(), ...)``; damaged after `torch.load`, which compares no checksums."""

    has_weights = False

    def __init__(self, whole: Process, good: Path) -> None:
        self.good = good
        good.mkdir(parents=True, exist_ok=True)
        torch.save(whole.training.optimizer.state_dict(), good / "optimizer.pt")

        def load(folder: Path) -> None:
            whole.training.optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))

        self.ways = {"load_state_dict": (whole, load)}

    def damage(self, chance: random.Random, folder: Path) -> str:
        return _damage_torch_file(chance, folder / "optimizer.pt")


def _damage_torch_file(chance: random.Random, path: Path) -> str:
    saved = torch.load(path)
    done = damage_content(chance, saved)
    torch.save(saved, path)
    return done


class TrainerSubject(Subject):
    """A checkpoint of Trainer, of one process or DDP ("plain") or of FSDP1 ("fsdp1")."""

    def __init__(self, form: str, sharded: Process, whole: Process, good: Path) -> None:
        self.form, self.good = form, good
        weights = {name: tensor.clone() for name, tensor in whole.training.model.state_dict().items()}
        good.mkdir(parents=True, exist_ok=True)
        torch.save({"last_epoch": SAVED_AT}, good / "scheduler.pt")
        if form == "fsdp1":
            dcp.save({"model": weights}, checkpoint_id=good / "pytorch_model_fsdp_0")
            save_sharded(sharded.training.optimizer, good / STATE_FOLDER)
        else:
            torch.save(whole.training.optimizer.state_dict(), good / "optimizer.pt")
            save_file(weights, good / "model.safetensors")
        self.ways = {
            f"load_training, {title}": (process, functools.partial(_load_training, process.training))
            for title, process in (("sharded", sharded), ("whole", whole))
        }

    def damage(self, chance: random.Random, folder: Path) -> str:
        if self.form == "fsdp1" and chance.random() < 0.5:
            return _damage_sharded(chance, folder / STATE_FOLDER)
        if self.form == "fsdp1":
            files = sorted((folder / "pytorch_model_fsdp_0").iterdir())
            return damage_files(chance, [*files, folder / "scheduler.pt"], [])
        if chance.random() < 0.5:
            return _damage_torch_file(chance, folder / "optimizer.pt")
        return damage_files(chance, [folder / "optimizer.pt", folder / "scheduler.pt"], [])


def _load_training(training: Plain, folder: Path) -> None:
    load_training(training.model, training.optimizer, functools.partial(read_training, folder))


def make_subjects(root: Path) -> list[Subject]:
    """Everything that has saved, and trained on; a collective of 2 ranks."""
    zero = [
        DeepSpeedSubject(stage, dtype, root / f"zero{stage}-{str(dtype)[6:]}")
        for stage, dtype in ((0, torch.float32), (0, torch.bfloat16), (2, torch.bfloat16), (3, torch.bfloat16))
    ]
    sharded, whole = Process(ShardedStateDDP()), Process(Plain())
    state_dict = StateDictSubject(whole, root / "state-dict" / "good")
    dcp_folder = ShardedSubject(sharded, whole, root / "sharded" / "good")
    trainer = [TrainerSubject(form, sharded, whole, root / form / "good") for form in ("plain", "fsdp1")]
    for process in (sharded, whole):
        process.train_on()
    return [*zero, *zero[2:], state_dict, dcp_folder, dcp_folder, *trainer]
