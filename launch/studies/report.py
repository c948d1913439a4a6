"""One self-contained HTML page for a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from . import plots
from .config import DigitsTask, Study, Task
from .results import Row

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(
    path: Path, study: Study, rows: Mapping[str, Sequence[Row]], hashes: Mapping[str, str], num_runs: int
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        study: What was run.
        rows: Name of each task -> its rows, in the order of the study.
        hashes: Name of each task -> hash of its data.
        num_runs: Finished runs.
    """
    tasks = [_task_section(study, name, rows[name], hashes[name]) for name in rows]
    finished = [row.first for section in rows.values() for row in section if row.first]
    versions = {version for record in finished for version in (record["torch"], record["package"])}
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    settings = study.model_dump(exclude={"title", "question", "quick"}, exclude_none=True)
    page = template.render(
        study=study,
        tasks=tasks,
        num_runs=num_runs,
        versions=sorted(versions),
        settings=yaml.safe_dump(settings, sort_keys=False, width=110),
    )
    path.write_text(page, encoding="utf-8")


def baseline_loss(study: Study, rows: Sequence[Row]) -> float | None:
    """Mean test loss of the study's baseline."""
    return next((row.mean_test for row in rows if row.optimizer == study.baseline), None)


def _task_section(study: Study, name: str, rows: Sequence[Row], data_sha256: str) -> dict[str, Any]:
    task = study.tasks[name]
    images = []
    if any(row.test for row in rows):
        figures = [plots.frontier(rows), plots.curves(rows)]
        if study.lr_factor:
            figures.insert(1, plots.rates(rows))
        if task.trace_every:
            figures.append(plots.traces(rows))
        images = [plots.data_uri(figure) for figure in figures]
    return {
        "name": name,
        "description": _describe(task, rows),
        "rows": rows,
        "baseline": baseline_loss(study, rows),
        "has_accuracy": isinstance(task, DigitsTask),
        "images": images,
        "growth": [_growth(row) for row in rows if row.first and row.first["trace"]],
        "data_sha256": data_sha256,
    }


def _growth(row: Row) -> dict[str, Any]:
    """How the traced numbers of a run are in its second and in its last tenth: the first one still fills the window."""
    trace = row.first["trace"]
    tenth = max(1, len(trace) // 10)
    numbers: dict[str, Any] = {"optimizer": row.optimizer}
    for name in ("error_norm", "grad_norm", "state_bytes"):
        values = [point[name] for point in trace]
        early, late = values[tenth : 2 * tenth] or values, values[-tenth:]
        numbers[name] = [statistics.fmean(early), statistics.fmean(late), max(values)]
    return numbers


def _describe(task: Task, rows: Sequence[Row]) -> str:
    counts = {row.first["num_params"] for row in rows if row.first}
    size = f"{counts.pop() / 1e6:.2f} million parameters, " if len(counts) == 1 else ""
    if isinstance(task, DigitsTask):
        return f"{task.model.upper()}, {size}from random weights, {task.steps} steps with {task.batch_size} images."
    start = "from random weights"
    if task.pretrain:
        start = f"pre-trained with AdamW on {task.pretrain.data} for {task.pretrain.steps} steps"
    steps = f"{task.steps:,} steps on {task.data} with {task.batch_size} x {task.seq_len} bytes each"
    return f"Byte-level Llama, {size}{start}; {steps}. Losses: nats a byte."
