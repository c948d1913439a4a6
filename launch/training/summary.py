"""What a run cost and gained: loss, speed, memory and optimizer state, as a table and as metrics.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer

from .callbacks import OptimizerTimer, StepTimer, base_optimizer, peak_memory

PACKAGES = ("microadam-dist", "torch", "deepspeed", "transformers", "accelerate")


@dataclass(frozen=True)
class StateUse:
    """Optimizer state as allocated, but for the counters of steps.

    Bytes are those of all ranks, a copy on each rank counts for each; parameters count once. So the bytes per parameter
    of the whole lie between those of the sparse and the dense path, which are given apart only for MicroAdam.
    """

    state_bytes: int
    state_bytes_per_param: float
    sparse_bytes_per_param: float | None = None
    dense_bytes_per_param: float | None = None
    dense_params: int | None = None


@dataclass(frozen=True)
class Metrics:
    """Content of metrics.json; rank 0's times."""

    optimizer: str
    world_size: int
    engine: str
    num_params: int
    heldout_before: float
    heldout_after: float
    tokens_per_second: float
    tokens_per_second_without_optimizer: float
    seconds: float
    optimizer_seconds: float
    peak_memory_bytes: int
    state: StateUse
    train_loss: list[tuple[int, float]]
    eval_loss: list[tuple[int, float]]
    versions: dict[str, str] = field(default_factory=dict)


def collect(
    trainer: Trainer,
    timer: StepTimer,
    optimizer_timer: OptimizerTimer,
    tokens_a_step: int,
    engine: str,
    num_params: int,
) -> Metrics:
    """Gather the numbers of a finished run; every rank must call it."""
    args, history = trainer.args, trainer.state.log_history
    optimizer = base_optimizer(trainer.optimizer)
    tokens, optimizer_seconds = timer.steps * tokens_a_step, optimizer_timer.clock.seconds()
    eval_loss = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return Metrics(
        optimizer=type(optimizer).__name__,
        world_size=args.world_size,
        engine=engine,
        num_params=num_params,
        heldout_before=eval_loss[0][1],
        heldout_after=eval_loss[-1][1],
        tokens_per_second=tokens / timer.seconds if tokens else 0.0,
        tokens_per_second_without_optimizer=tokens / (timer.seconds - optimizer_seconds) if tokens else 0.0,
        seconds=timer.seconds,
        optimizer_seconds=optimizer_seconds,
        peak_memory_bytes=max(_gather(trainer, peak_memory())),
        state=state_use(trainer, optimizer, num_params),
        train_loss=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        eval_loss=eval_loss,
        versions=versions(),
    )


def state_use(trainer: Trainer, optimizer: torch.optim.Optimizer, num_params: int) -> StateUse:
    """Count the bytes of the optimizer's state over all ranks."""
    if hasattr(optimizer, "state_bytes"):
        return paths_use([sum(_gather(trainer, count)) for count in optimizer.state_bytes()], num_params)
    tensors = [
        getattr(value, "_local_tensor", value)  # a DTensor counts all ranks' bytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and name != "step"
    ]
    total = sum(_gather(trainer, sum(tensor.nbytes for tensor in tensors)))
    return StateUse(total, total / num_params)


def paths_use(sums: Sequence[int], num_params: int) -> StateUse:
    """The state of MicroAdam.

    Args:
        sums: `StateBytes` of all ranks together.
        num_params: Each once.
    """
    sparse_numel, sparse_bytes, dense_numel, dense_bytes = sums
    copies = max(1, round((sparse_numel + dense_numel) / num_params))  # under DDP every rank has all of it
    sparse_params, dense_params = sparse_numel // copies, dense_numel // copies
    total = sparse_bytes + dense_bytes
    return StateUse(
        total,
        total / num_params,
        sparse_bytes / sparse_params if sparse_params else None,
        dense_bytes / dense_params if dense_params else None,
        dense_params,
    )


def _gather(trainer: Trainer, value: int) -> list[int]:
    """The value of every rank."""
    return trainer.accelerator.gather(torch.tensor([value], device=trainer.args.device)).tolist()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def report(metrics: Metrics, output: Path, console: Console) -> None:
    """Write metrics.json and print the table."""
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(metrics).items())
    (output / "metrics.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    title = f"{metrics.optimizer}, {metrics.engine}, world size {metrics.world_size}"
    table = Table(title=title, show_header=False)
    for name, value in _rows(metrics):
        table.add_row(name, value)
    console.print(table)
    console.print(f"Weights, metrics.json and TensorBoard logs are in {output}")


def _rows(metrics: Metrics) -> list[tuple[str, str]]:
    state = metrics.state
    rows = [
        ("held-out loss", f"{metrics.heldout_before:.4f} -> {metrics.heldout_after:.4f} nats per token"),
        ("speed", f"{metrics.tokens_per_second:,.0f} tokens/s"),
        ("  without the optimizer", f"{metrics.tokens_per_second_without_optimizer:,.0f} tokens/s"),
        ("training time", f"{metrics.seconds:.1f} s"),
        ("  of the optimizer", f"{100 * metrics.optimizer_seconds / (metrics.seconds or 1):.1f} %"),
        ("peak memory per rank", f"{metrics.peak_memory_bytes / 2**20:,.0f} MiB"),
        ("trained parameters", f"{metrics.num_params:,}"),
        ("optimizer state, all ranks", f"{state.state_bytes_per_param:.3f} bytes per parameter"),
    ]
    if state.sparse_bytes_per_param is not None:
        rows.append(("  sparse path", f"{state.sparse_bytes_per_param:.3f} bytes per parameter"))
    if state.dense_bytes_per_param is not None:
        dense = f"{state.dense_bytes_per_param:.3f} bytes per parameter, {state.dense_params:,} parameters"
        rows.append(("  dense path (norms, biases)", dense))
    return rows
