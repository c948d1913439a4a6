"""What the ``microadam`` command does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..checkpoint.deepspeed_reshard import reshard_checkpoint
from ..diagnostics.cuda_checks import check_this_machine
from ..diagnostics.environment import backends, chosen, versions
from ..diagnostics.report import write_report
from .bench import app as bench
from .output import OneLineErrors, console, tables, write_json
from .plan import plan

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench, name="bench")
app.command()(plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"microadam {versions()['microadam-dist']}")
        raise typer.Exit()


@app.callback()
def microadam(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Tools for MicroAdam: Adam with 0.56 bytes of optimizer state per parameter."""


@app.command()
def reshard(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder written by DeepSpeed's save_checkpoint.")],
    target: Annotated[Path, typer.Argument(help="New folder; it appears when it is complete and verified.")],
    world_size: Annotated[int, typer.Option(help="Number of data-parallel ranks to write for.")],
    tag: Annotated[str | None, typer.Option(help="Which checkpoint in the folder; the newest by default.")] = None,
) -> None:
    """Rewrite a ZeRO-1, 2 or 3 checkpoint for another number of ranks."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        rebuilt = reshard_checkpoint(source, target, world_size, tag, progress)
    cut = f"Exact but for {len(rebuilt)} blocks cut in another way."
    console.print(f"{target}: {world_size} ranks, verified. {cut}", highlight=False, soft_wrap=True)
    for fqn, start, end in rebuilt[:10]:
        console.print(f"  {fqn} [{start}, {end})", highlight=False)
    if len(rebuilt) > 10:
        console.print(f"  ... and {len(rebuilt) - 10} more")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of launch/train.py, or of a Trainer.")],
    output: Annotated[
        Path | None, typer.Option(help="The picture: .html, .png, .svg or .pdf; report.html in the folder by default.")
    ] = None,
) -> None:
    """Draw the metrics that MicroAdam(metrics_every=N) has logged in a run, with the loss."""
    output = output or run / "report.html"
    write_report(run, output)
    console.print(f"{output}: written", highlight=False)


@app.command()
def doctor(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write it to this file; - is standard output.")
    ] = None,
) -> None:
    """Show versions, the backends this machine can use, which one takes the step, and what CUDA lacks."""
    found = {"versions": versions(), "backends": backends(), "auto": chosen()}
    checks = check_this_machine()
    table = Table(show_header=False, box=None)
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_section()
    for name, usable in found["backends"].items():
        table.add_row(f"backend {name}", usable)
    for device, backend in found["auto"].items():
        table.add_row(f'backend="auto" on {device}', backend)
    table.add_section()
    for check in checks:
        table.add_row(
            f"CUDA: {check.name}", check.finding if check.passed else f"{check.finding}. To do: {check.remedy}"
        )
    tables(json_file).print(table)
    if json_file:
        write_json({**found, "cuda": [asdict(check) for check in checks]}, json_file)
