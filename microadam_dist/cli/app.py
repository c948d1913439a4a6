"""What the ``microadam`` command does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from ..checkpoint.deepspeed_reshard import reshard_checkpoint
from ..diagnostics.environment import backends, chosen, versions
from ..diagnostics.report import write_report
from ..errors import MicroAdamError
from .bench import app as bench
from .plan import plan

console = Console(stderr=True)


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (MicroAdamError, OSError) as error:
            console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.add_typer(bench, name="bench")
app.command()(plan)


@app.callback()
def microadam() -> None:
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
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        rebuilt = reshard_checkpoint(source, target, world_size, tag, progress)
    console.print(f"{target}: {world_size} ranks, verified. Exact but for {len(rebuilt)} blocks cut in another way.")
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
def doctor() -> None:
    """Show versions, the backends this machine can use, and which one takes the step."""
    table = Table(show_header=False, box=None)
    for name, found in versions().items():
        table.add_row(name, found)
    table.add_section()
    for name, found in backends().items():
        table.add_row(f"backend {name}", found)
    for device, backend in chosen().items():
        table.add_row(f'backend="auto" on {device}', backend)
    Console().print(table)
