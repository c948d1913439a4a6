"""What studies have found, as one self-contained HTML page or as Markdown with figures beside it."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure

from . import plots
from .config import DigitsTask, Task
from .runs import Row, StudyReport, baseline_loss

TEMPLATES = Path(__file__).parent


def write_html(path: Path, reports: Sequence[StudyReport]) -> None:
    """Write the page, with all figures."""
    studies = [_section(report) for report in reports]
    for study, report in zip(studies, reports, strict=True):
        if figure := _factors(report):
            study["factors"] = plots.data_uri(figure)
        for task in study["tasks"]:
            task["images"] = [plots.data_uri(draw(task["rows"])) for draw in _figures(study, task).values()]
    path.write_text(_render("report.html.j2", studies), encoding="utf-8")


def write_markdown(folder: Path, reports: Sequence[StudyReport]) -> None:
    """Write RESULTS.md and figures/*.svg: memory against loss, the norms of long runs, learning rates of all seeds."""
    studies = [_section(report) for report in reports]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for study, report in zip(studies, reports, strict=True):
        if figure := _factors(report):
            study["factors"] = Path("figures") / f"{study['name']}_factors.svg"
            plots.save(figure, folder / study["factors"])
        for task in study["tasks"]:
            task["images"] = []
            wanted = {"traces", "rates"} if study.get("factors") else {"traces", "frontier"}
            wanted |= {"rates"} if study["shows_rates"] else set()
            for name, draw in _figures(study, task).items():
                if name in wanted:
                    path = folder / "figures" / f"{study['name']}_{_slug(task['name'])}_{name}.svg"
                    plots.save(draw(task["rows"]), path)
                    task["images"].append(path.relative_to(folder))
    (folder / "RESULTS.md").write_text(_render("report.md.j2", studies), encoding="utf-8")


def _render(template: str, studies: Sequence[dict[str, Any]]) -> str:
    source = (TEMPLATES / template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=".html" in template, trim_blocks=True, lstrip_blocks=True)
    python = f"Python {platform.python_version()}"
    return environment.from_string(source).render(studies=studies, python=python)


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def _section(report: StudyReport) -> dict[str, Any]:
    study = report.study
    finished = [row.first for rows in report.rows.values() for row in rows if row.first]
    settings = study.model_dump(exclude={"title", "question", "quick"}, exclude_none=True)
    return {
        "name": report.name,
        "title": study.title,
        "question": study.question,
        "lr_factor": study.lr_factor,
        "frontier": study.frontier,
        "shows_rates": study.search_seeds > 1,
        "baseline": study.baseline,
        "num_runs": report.num_runs,
        "tasks": [_task_section(report, name) for name in report.rows],
        "versions": sorted({version for record in finished for version in (record["torch"], record["package"])}),
        "settings": yaml.safe_dump(settings, sort_keys=False, width=110),
    }


def _task_section(report: StudyReport, name: str) -> dict[str, Any]:
    task, rows = report.study.tasks[name], report.rows[name]
    return {
        "name": name,
        "description": _describe(task, rows),
        "rows": rows,
        "baseline": baseline_loss(report.study, rows),
        "baseline_optimum": next((row.optimum for row in rows if row.optimizer == report.study.baseline), None),
        "lrs": sorted({lr for row in rows for lr in row.tests or ()}),
        "has_trace": bool(task.trace_every),
        "has_accuracy": isinstance(task, DigitsTask),
        "has_metrics": any(row.first and row.first.get("metrics") for row in rows),
        "growth": [_growth(row) for row in rows if row.first and row.first["trace"]],
        "data_sha256": report.hashes[name],
    }


def _factors(report: StudyReport) -> Figure | None:
    """The figure of a study that asks for the learning rates of several lengths."""
    lengths = [(report.study.tasks[name].steps, rows) for name, rows in report.rows.items()]
    finished = [(steps, rows) for steps, rows in lengths if any(row.optimum for row in rows)]
    if report.study.search_seeds == 1 or len({steps for steps, _ in finished}) < 2:
        return None
    return plots.factors(finished, report.study.baseline)


def _figures(study: dict[str, Any], task: dict[str, Any]) -> dict[str, Callable[[Sequence[Row]], Any]]:
    """What draws the figures of a task, by name."""
    if not any(row.test for row in task["rows"]):
        return {}
    figures: dict[str, Callable[[Sequence[Row]], Any]] = {
        "frontier": partial(plots.frontier, counted=study["frontier"])
    }
    if study["lr_factor"] or study["shows_rates"]:
        figures["rates"] = plots.rates
    figures["curves"] = plots.curves
    return figures | ({"traces": plots.traces} if task["has_trace"] else {})


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
    return f"Byte-level Llama, {size}{start}; {steps}. Losses: nats per byte."
