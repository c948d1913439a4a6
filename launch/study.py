"""Compare optimizers: every one at its own best learning rate, several seeds, held-out data, measured state.

    python launch/study.py configs/studies/*.yaml --output runs/studies

A study is a YAML file (configs/studies); its data are texts that are on every machine, or your own. Finished runs are
kept in OUTPUT/STUDY/results.jsonl and never run twice, so an interrupted study goes on where it was. The report is
OUTPUT/report.html.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from microadam_dist.diagnostics.environment import versions
from studies.config import Run, Study, cell_key, load_study
from studies.optimizers import why_unavailable
from studies.runs import (
    Cell,
    Results,
    Row,
    StudyReport,
    baseline_loss,
    next_runs,
    summarize,
    without_failures,
)
from studies.tasks import prepare_data, pretrain
from studies.training import train
from studies.workers import Failure, Job, Workers
from training.errors import UserError

console = Console()


def main(
    configs: Annotated[list[Path], typer.Argument(help="Studies as YAML; configs/studies has some.")],
    output: Annotated[Path, typer.Option(help="Folder for results, report and cached data.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = os.cpu_count() or 1,
    only: Annotated[str, typer.Option(help="Only these, as a pattern of TASK/OPTIMIZER: '*/MicroAdam*'.")] = "*",
    quick: Annotated[bool, typer.Option("--quick", help="The short version in the file, a minute or two.")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing, write the report again.")] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write RESULTS.md, with its figures, to this folder.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the losses to this file.", show_default=False)
    ] = None,
) -> None:
    """Run what is missing of some studies and write their report."""
    # As Ctrl-C: the workers are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        num_workers = 0 if report_only else jobs
        run_studies(
            configs, output, num_workers=num_workers, only=only, quick=quick, markdown=markdown, json_file=json_file
        )
    except UserError as error:
        console.print(f"[bold red]Error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from here.")
        raise typer.Exit(130) from None


def run_studies(
    configs: Sequence[Path],
    output: Path,
    *,
    num_workers: int,
    only: str = "*",
    quick: bool = False,
    markdown: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Run what is missing, unless there are no workers, and write the report.

    Raises:
        UserError: A file is no study, or the data cannot be read.
    """
    runners = [StudyRunner(config.stem, load_study(config, quick=quick), output) for config in configs]
    if num_workers:
        if not any(runner.matching(only) for runner in runners):
            first = runners[0].cells[0]
            raise UserError(f"--only '{only}' matches none of TASK/OPTIMIZER, such as '{first.task}/{first.optimizer}'")
        for runner in runners:
            runner.run(num_workers, only)
    reports = [runner.report() for runner in runners]
    if json_file:
        json_file.write_text(json.dumps(_losses(reports), indent=1) + "\n", encoding="utf-8")
    from studies.report import write_html, write_markdown  # matplotlib is slow to import

    write_html(output / "report.html", reports)
    console.print(f"Report: {output / 'report.html'}", highlight=False)
    if markdown:
        write_markdown(markdown, reports)


def _losses(reports: Sequence[StudyReport]) -> dict[str, Any]:
    """What the tables show, with every seed, and on what machine it was found."""
    rows = [(report.name, row) for report in reports for members in report.rows.values() for row in members]
    fields = (
        "task",
        "optimizer",
        "note",
        "lr",
        "rates",
        "test",
        "bytes_per_param",
        "weight_bytes_per_param",
        "step_ms",
    )
    return {
        "command": shlex.join(["python", "launch/study.py", *sys.argv[1:]]),
        "devices": sorted({row.first.get("device", "cpu") for _, row in rows if row.first}),
        "versions": versions(),
        "num_params": {f"{name}, {row.task}": row.first["num_params"] for name, row in rows if row.first},
        "rows": [{"study": name, **{field: getattr(row, field) for field in fields}} for name, row in rows],
    }


class StudyRunner:
    """A study and where its results are.

    Args:
        name: Of its file and of the folder with its results.
        study: What to run.
        output: Holds the folders of all studies, and the data and pre-trained models that they share.
    """

    def __init__(self, name: str, study: Study, output: Path) -> None:
        self.name, self.study, self.output = name, study, output
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        self.hashes = {name: prepare_data(task, output) for name, task in study.tasks.items()}
        self.cells = [
            Cell(task, optimizer, cell_key(study, task, optimizer, self.hashes[task]))
            for task in study.tasks
            for optimizer in study.tasks[task].optimizers or study.optimizers
        ]
        self.results = Results(folder / "results.jsonl")
        self._unavailable_path = folder / "unavailable.json"
        self.unavailable: dict[str, str] = {}
        if self._unavailable_path.is_file():
            self.unavailable = json.loads(self._unavailable_path.read_text())

    def matching(self, only: str) -> list[Cell]:
        """The cells that a pattern of TASK/OPTIMIZER matches."""
        return [cell for cell in self.cells if fnmatch(f"{cell.task}/{cell.optimizer}", only)]

    def run(self, num_workers: int, only: str) -> None:
        """Do every missing run of the cells that match.

        Raises:
            UserError: It needs a GPU, and there is none.
        """
        if self.study.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"{self.name}: device: cuda, but torch {torch.__version__} sees no GPU here")
        cells = self.matching(only)
        cells = [cell for cell in cells if next_runs(self.study, cell, without_failures(self.results.of(cell)))]
        if not cells:
            return
        with Workers(num_workers, self.output / "compiled") as workers, _progress() as progress:
            self._prepare(workers, progress, cells)
            cells = [cell for cell in cells if cell.optimizer not in self.unavailable]
            Schedule(self, cells, workers, progress).run()

    def _prepare(self, workers: Workers, progress: Progress, cells: list[Cell]) -> None:
        """Find out which optimizers run here, and make the pre-trained models."""
        tasks = {name: self.study.tasks[name] for name in dict.fromkeys(cell.task for cell in cells)}
        starts = {repr((task.pretrain, task.model, task.seq_len)): task for task in tasks.values() if _pretrains(task)}
        queue = [Job(None, pretrain, (task, self.output, self.study.device)) for task in starts.values()]
        for name in dict.fromkeys(cell.optimizer for cell in cells):
            entry = self.study.optimizers[name]
            queue.append(Job(name, why_unavailable, (entry.type, entry.settings, self.study.device)))
        bar = progress.add_task("checking optimizers, pre-training", total=len(queue))
        while queue or workers.is_busy:
            while queue and workers.num_idle:
                workers.submit(queue.pop(0))
            job, result = workers.next_result()
            progress.advance(bar)
            if job.tag is None:
                if isinstance(result, Failure):
                    raise UserError(f"pre-training failed: {result.error}\n{result.details}")
                continue
            self.unavailable.pop(job.tag, None)
            if result is not None:
                self.unavailable[job.tag] = result.error if isinstance(result, Failure) else result
                console.print(f"[yellow]{job.tag} cannot run here:[/] {self.unavailable[job.tag]}", highlight=False)
        self._unavailable_path.write_text(json.dumps(self.unavailable, indent=2))

    def rows(self) -> dict[str, list[Row]]:
        """What has been found so far, task by task."""
        rows: dict[str, list[Row]] = {name: [] for name in self.study.tasks}
        for cell in self.cells:
            unavailable = self.unavailable.get(cell.optimizer)
            rows[cell.task].append(summarize(self.study, cell, self.results.of(cell), unavailable))
        return rows

    def report(self) -> StudyReport:
        """Print the tables, and return what a report needs."""
        rows = self.rows()
        for name, members in rows.items():
            console.print(_table(name, members, baseline_loss(self.study, members)))
            for row in members:
                if row.note:
                    console.print(f"  {row.optimizer}: {row.note}", highlight=False, markup=False)
        num_runs = sum(len(self.results.of(cell)) for cell in self.cells)
        return StudyReport(self.name, self.study, rows, self.hashes, num_runs)


class Schedule:
    """Keeps the workers busy with the runs of some cells until all are finished.

    Args:
        runner: The study.
        cells: What to finish.
        workers: Who does it.
        progress: Where the bar goes; its unit is a training step.
    """

    def __init__(self, runner: StudyRunner, cells: list[Cell], workers: Workers, progress: Progress) -> None:
        self.runner, self.cells, self.workers, self.progress = runner, cells, workers, progress
        self.bar = progress.add_task("training steps", total=None)
        self.under_way: set[Run] = set()
        self.failed: set[Cell] = set()
        self.steps_done = 0

    def run(self) -> None:
        """Return when nothing is left to do; what fails is recorded and not tried again this time."""
        while True:
            waiting = self._waiting()
            for cell, run in waiting[: self.workers.num_idle]:
                study = self.runner.study
                settings = study.tasks[run.task], study.optimizers[run.optimizer]
                self.workers.submit(Job((cell, run), train, (run, *settings, self.runner.output, study.device)))
                self.under_way.add(run)
            if not self.workers.is_busy:
                return
            job, result = self.workers.next_result()
            cell, run = job.tag
            self.under_way.remove(run)
            if isinstance(result, Failure):
                self.failed.add(cell)
                console.print(f"[red]failed:[/] {run}: {result.error}", highlight=False)
                result = {**run._asdict(), "error": result.error, "details": result.details}
            self.runner.results.add(cell, result)
            self.steps_done += self._num_steps(cell)
            total = self.steps_done + self._steps_to_come()
            self.progress.update(self.bar, completed=self.steps_done, total=total)

    def _records(self, cell: Cell) -> dict[tuple[float, int], Any]:
        """What has been run; a failure of an earlier time is tried again."""
        records = self.runner.results.of(cell)
        return records if cell in self.failed else without_failures(records)

    def _waiting(self) -> list[tuple[Cell, Run]]:
        runs = []
        for cell in self.cells:
            if cell not in self.failed:
                missing = next_runs(self.runner.study, cell, self._records(cell))
                runs += [(cell, run) for run in missing if run not in self.under_way]
        return runs

    def _num_steps(self, cell: Cell) -> int:
        return self.runner.study.tasks[cell.task].steps

    def _steps_to_come(self) -> int:
        """Training steps still to do or under way, if every search ends after three learning rates."""
        study, total = self.runner.study, 0
        for cell in self.cells:
            records = self._records(cell)
            missing = next_runs(study, cell, records)
            if missing and cell not in self.failed:
                num_seeds = study.tasks[cell.task].seeds or study.seeds
                num_rates = 3 if study.lr_factor else len(study.optimizers[cell.optimizer].lr)
                total += max(num_rates + num_seeds - 1 - len(records), len(missing)) * self._num_steps(cell)
        return total


def _pretrains(task: Any) -> bool:
    return getattr(task, "pretrain", None) is not None


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console)


def _table(name: str, rows: list[Row], baseline: float | None) -> Table:
    table = Table(title=name, title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("B/param", "lr", "validation", "test", "against baseline"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [""] * 5
        if row.first:
            cells = [f"{row.bytes_per_param:.3f}", f"{row.lr:.2g}", f"{row.rates[row.lr]:.4f}", f"{row.mean_test:.4f}"]
            cells += ["" if baseline is None else f"{row.mean_test - baseline:+.4f}"]
        table.add_row(row.optimizer, *cells)
    return table


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
