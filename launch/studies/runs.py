"""Finished runs, which runs are still to do, and what they amount to."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .config import Run, Study

# A search that has not found an interior best learning rate by then stops, and the report says so.
MAX_RATES = 9

Record = dict[str, Any]


class Cell(NamedTuple):
    """One optimizer on one task; ``key`` identifies all settings and the data."""

    task: str
    optimizer: str
    key: str


class Results:
    """The file of finished runs, one JSON record per line.

    Args:
        path: The file; a last line that was cut off is ignored.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, dict[tuple[float, int], Record]] = {}
        if path.is_file():
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if len(complete) < len(content):
                path.write_bytes(complete)
            for line in complete.splitlines():
                self._insert(json.loads(line))

    def add(self, cell: Cell, record: Record) -> None:
        """Store a finished run; it is on the disk afterwards."""
        record = {"cell": cell.key, **record}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._insert(record)

    def _insert(self, record: Record) -> None:
        self._records.setdefault(record["cell"], {})[record["lr"], record["seed"]] = record

    def of(self, cell: Cell) -> dict[tuple[float, int], Record]:
        """Records of a cell by learning rate and seed; a failed run is there with an "error"."""
        return self._records.get(cell.key, {})


def without_failures(records: dict[tuple[float, int], Record]) -> dict[tuple[float, int], Record]:
    """Only runs that came to their end."""
    return {key: record for key, record in records.items() if "error" not in record}


def validation_losses(study: Study, cell: Cell, records: dict[tuple[float, int], Record]) -> dict[float, float]:
    """Learning rate -> mean validation loss of the seeds that choose it; see `_mean_losses`."""
    return _mean_losses(records, "validation", _search_seeds(study, cell))


def _mean_losses(records: dict[tuple[float, int], Record], split: str, num_seeds: int) -> dict[float, float]:
    """Learning rate -> mean loss of the first seeds, ascending; infinite where one diverged or failed."""
    losses: dict[float, list[float]] = {}
    for (lr, seed), record in sorted(records.items()):
        if seed < num_seeds:
            losses.setdefault(lr, []).append(record[split]["loss"] if record.get(split) else math.inf)
    return {lr: statistics.fmean(of_seeds) for lr, of_seeds in losses.items()}


def interpolate(validation: Mapping[float, float], test: Mapping[float, float]) -> tuple[float, float] | None:
    """The best learning rate between those tried, and the test loss there; None where the best one tried is at an edge.

    From parabolas, over the logarithm of the rate, through the rate with the lowest validation loss and its neighbours.
    """
    rates = sorted(validation)
    best = min(range(len(rates)), key=lambda i: validation[rates[i]])
    near = rates[max(best - 1, 0) : best + 2]
    if len(near) < 3 or not all(math.isfinite(losses[lr]) for lr in near for losses in (validation, test)):
        return None
    x = np.log(near)
    curvature, slope, _ = np.polyfit(x, [validation[lr] for lr in near], 2)
    lowest = -slope / (2 * curvature)
    return math.exp(lowest), float(np.polyval(np.polyfit(x, [test[lr] for lr in near], 2), lowest))


def best_rate(study: Study, cell: Cell, records: dict[tuple[float, int], Record]) -> float | None:
    """The learning rate with the lowest validation loss; None if no run has one."""
    losses = validation_losses(study, cell, records)
    best = min(losses, key=lambda lr: losses[lr], default=None)
    return None if best is None or math.isinf(losses[best]) else best


def next_runs(study: Study, cell: Cell, records: dict[tuple[float, int], Record]) -> list[Run]:
    """What is to be run next for a cell, given what has been run; nothing if it is finished.

    First the learning rates of the grid, then the neighbours of the best one until it lies inside, then the other
    seeds at the best.
    """

    def missing(rates: Sequence[float], num_seeds: int) -> list[Run]:
        wanted = [Run(cell.task, cell.optimizer, _rounded(lr), seed) for lr in rates for seed in range(num_seeds)]
        return [run for run in wanted if (run.lr, run.seed) not in records]

    num_search_seeds = _search_seeds(study, cell)
    if runs := missing(study.optimizers[cell.optimizer].lr, num_search_seeds):
        return runs
    best = best_rate(study, cell, records)
    if best is None:
        return []
    if study.lr_factor and len(validation_losses(study, cell, records)) < MAX_RATES:
        if runs := missing([best / study.lr_factor, best * study.lr_factor], num_search_seeds):
            return runs
    num_seeds = study.tasks[cell.task].seeds or study.seeds
    return missing([best], num_seeds)


def _search_seeds(study: Study, cell: Cell) -> int:
    return study.tasks[cell.task].search_seeds or study.search_seeds


def _rounded(lr: float) -> float:
    """So that a rate reached by doubling and one written in the file are the same one."""
    return float(f"{lr:.6g}")


@dataclass(frozen=True)
class Row:
    """What a cell amounts to; the numbers are None where no run finished.

    Attributes:
        note: Why there is no result, or what to keep in mind about it.
        lr: The best learning rate on the validation split.
        rates: Validation loss of every learning rate tried.
        tests: Mean test loss of every learning rate tried.
        optimum: See `interpolate`.
        test: Test losses at the best rate, one for each seed.
        accuracies: Likewise.
        bytes_per_param: State, as allocated.
        weight_bytes_per_param: Likewise.
        step_ms: Time of the optimizer's step alone; machine and load decide it.
        first: The record with the best rate and seed 0.
        all_seeds: All records with the best rate.
    """

    task: str
    optimizer: str
    note: str
    lr: float | None = None
    rates: dict[float, float] | None = None
    tests: dict[float, float] | None = None
    optimum: tuple[float, float] | None = None
    test: tuple[float, ...] = ()
    accuracies: tuple[float, ...] = ()
    bytes_per_param: float | None = None
    weight_bytes_per_param: float | None = None
    step_ms: float | None = None
    first: Record | None = None
    all_seeds: tuple[Record, ...] = ()

    @property
    def mean_test(self) -> float | None:
        """Mean test loss over the seeds."""
        return statistics.fmean(self.test) if self.test else None


def summarize(study: Study, cell: Cell, records: dict[tuple[float, int], Record], unavailable: str | None) -> Row:
    """Condense the runs of a cell."""
    best = best_rate(study, cell, records)
    if best is None:
        errors = [record["error"] for record in records.values() if record.get("error")]
        if unavailable:
            note = f"cannot run here: {unavailable}"
        elif errors:
            note = f"failed: {errors[0]}"
        else:
            note = "diverged at every rate" if records else "not run yet"
        return Row(cell.task, cell.optimizer, note)
    at_best = [record for (lr, _), record in sorted(records.items()) if lr == best and record.get("test")]
    first = records[best, 0]
    losses = validation_losses(study, cell, records)
    tests = _mean_losses(records, "test", _search_seeds(study, cell))
    notes = []
    if study.lr_factor and best in (min(losses), max(losses)):
        notes.append("best rate at the edge of those tried")
    num_seeds = study.tasks[cell.task].seeds or study.seeds
    if len(at_best) < num_seeds:
        notes.append(f"{len(at_best)} of {num_seeds} seeds")
    return Row(
        cell.task,
        cell.optimizer,
        "; ".join(notes),
        best,
        losses,
        tests,
        interpolate(losses, tests),
        tuple(record["test"]["loss"] for record in at_best),
        tuple(record["test"]["accuracy"] for record in at_best),
        first["state_bytes"] / first["num_params"],
        first["weight_bytes"] / first["num_params"],
        statistics.median(record["step_ms"] for record in at_best),
        first,
        tuple(at_best),
    )


@dataclass(frozen=True)
class StudyReport:
    """What there is to say about a study.

    Attributes:
        name: Of its file.
        rows: Name of each task -> its rows, in the order of the study.
        hashes: Name of each task -> hash of its data.
        num_runs: Finished runs.
    """

    name: str
    study: Study
    rows: Mapping[str, Sequence[Row]]
    hashes: Mapping[str, str]
    num_runs: int


def baseline_loss(study: Study, rows: Sequence[Row]) -> float | None:
    """Mean test loss of the study's baseline."""
    return next((row.mean_test for row in rows if row.optimizer == study.baseline), None)
