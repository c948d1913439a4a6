"""``microadam bench``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..bench.contenders import BASELINE, Comparison, contender_makers, contender_names, free_bytes, needed_bytes
from ..bench.measure import Row, describe, num_steps, require_isa, rows, time_in_turn
from ..bench.plot import plot
from ..bench.workload import Workload, parse_dtype, parse_model, parse_numel, parse_setting
from ..diagnostics.environment import versions
from ..errors import BackendUnavailableError, ConfigError, MicroAdamError
from .output import console, require_writable, tables, write_json
from .settings import with_percent

app = typer.Typer(no_args_is_help=True, help="Optimizer steps side by side in one process.")


class Device(str, Enum):
    """Where a step can be measured."""

    cpu = "cpu"
    cuda = "cuda"


@app.command()
def step(
    device: Annotated[Device, typer.Option(help="Where the parameters lie.")] = Device.cpu,
    numel: Annotated[str, typer.Option(help="Sizes: 64M is one matrix, 1000x64K a thousand.")] = "16M,64M",
    model: Annotated[str, typer.Option(help="Tensors of these Llamas instead of --numel: 7b, 13b, 8b.")] = "",
    dtype: Annotated[str, typer.Option(help="Of weights and gradients: fp32, bf16, fp16.")] = "fp32,bf16",
    settings: Annotated[
        str, typer.Option(help="MicroAdam's window_size/density[/packed][/nearest][/ef2]; 10/1% is 10/0.01.")
    ] = "10/1%,2/5%,1/10%",
    weight_decay: Annotated[float, typer.Option(help="Of all optimizers.")] = 0.01,
    isa: Annotated[str, typer.Option(help="Instruction sets of the CPU kernel; default: the best one.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as torch takes.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of every optimizer, in turn.")] = 15,
    reference: Annotated[bool, typer.Option(help="Also the pure PyTorch backend (at most 1M parameters).")] = True,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Also DeepSpeedCPUAdam; compiles its op.")] = False,
    in_backward: Annotated[
        bool, typer.Option("--in-backward", help="Also MicroAdam tensor by tensor, as with released gradients.")
    ] = False,
    contenders: Annotated[
        str, typer.Option(help=f"Only those with one of these in their names, and {BASELINE}: MicroAdam,torchao.")
    ] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file; - is standard output.")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw time against size to this file.")] = None,
) -> None:
    """Time optimizer steps: MicroAdam, torch's AdamW and others, and a plain copy.

    They step in turn, or one after another where their states do not fit memory together; on the same parameters, with
    gradients that change from step to step. One fused pass over memory reads the gradient, and reads and writes weights
    and state; of a window it reads all slots and writes one.
    """
    if threads:
        torch.set_num_threads(threads)
    workloads = [parse_model(x) for x in _list(model)] or [parse_numel(x) for x in _list(numel)]
    dtypes = {x: parse_dtype(x) for x in _list(dtype)}
    configs = {x: parse_setting(x, weight_decay) for x in map(with_percent, _list(settings))}
    if not (workloads and dtypes and configs):
        raise ConfigError("there is nothing to measure: --numel, --dtype and --settings each need a value.")
    if plot_file and find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib.")
    require_writable(json_file, plot_file)
    only = tuple(_list(contenders))
    comparison = Comparison(
        _usable(device), configs, _usable_isas(isa, device), reference, deepspeed, in_backward, only
    )
    _require_known(comparison)
    cases = list(product(workloads, dtypes.items()))
    together = [_fits_together(workload, dtype, comparison) for workload, dtype in cases]
    found, missing = _run(cases, together, comparison, repeats)
    _print(found, together, missing, tables(json_file), shows_host=device is Device.cuda)
    machine = describe(comparison.device)
    if json_file:
        result = {
            "command": shlex.join(["microadam", *sys.argv[1:]]),
            "device": machine,
            "versions": versions(),
            "not_measured": missing,
            "rows": [
                {**asdict(row), "measured": WAYS[in_turn]}
                for in_turn, members in zip(together, found, strict=True)
                for row in members
            ],
        }
        write_json(result, json_file)
    if plot_file:
        plot(
            [row for members in found for row in members],
            f"{machine['name']}, {machine.get('threads', 1)} threads",
            plot_file,
        )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _usable(device: Device) -> torch.device:
    if device is Device.cuda and not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here; use --device cpu, or a machine with a "
            "GPU and a CUDA build of torch."
        )
    return torch.device(device.value)


def _usable_isas(text: str, device: Device) -> tuple[str, ...]:
    isas = tuple(_list(text))
    if isas and device is not Device.cpu:
        raise ConfigError(f"--isa {text}: only the CPU kernel has instruction sets to choose from; use --device cpu.")
    for name in isas:
        require_isa(name)
    return isas


def _require_known(comparison: Comparison) -> None:
    names = contender_names(replace(comparison, only=()))
    for part in comparison.only:
        if not any(replace(comparison, only=(part,)).selects(name) for name in names):
            raise ConfigError(f"--contenders {part!r} is in the name of none of {', '.join(names)}.")


def _fits_together(workload: Workload, named_dtype: tuple[str, torch.dtype], comparison: Comparison) -> bool:
    """Whether all contenders fit memory at once; an error where not even the largest one does."""
    name, dtype = named_dtype
    free = free_bytes(comparison.device)
    together, alone = (needed_bytes(workload, dtype, comparison, together=together) for together in (True, False))
    if alone > free:
        raise ConfigError(
            f"{workload.name} {name}: the largest of the optimizers needs more than {alone / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free on {comparison.device}. Choose smaller sizes or fewer --contenders."
        )
    return together <= free


WAYS = {True: "in turn", False: "one after another"}


def _run(
    cases: Sequence[tuple[Workload, tuple[str, torch.dtype]]],
    together: Sequence[bool],
    comparison: Comparison,
    repeats: int,
) -> tuple[list[list[Row]], dict[str, str]]:
    warmup = 1 + max(config.window_size for config in comparison.configs.values())
    found: list[list[Row]] = []
    missing: dict[str, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Drawn between the steps: a thread that draws takes time from the step that runs.
    with Progress(*columns, console=console, auto_refresh=False) as bar:

        def progress(task: TaskID) -> None:
            bar.advance(task)
            bar.refresh()

        for (workload, (name, dtype)), in_turn in zip(cases, together, strict=True):
            makers = contender_makers(workload, dtype, comparison)
            steps = num_steps(warmup, repeats)
            task = bar.add_task(f"{workload.name} {name}, {WAYS[in_turn]}", total=steps * len(makers))
            timings, waiting = [], []
            run = partial(time_in_turn, warmup=warmup, repeats=repeats, progress=partial(progress, task))
            for contender, make in makers.items():
                try:
                    waiting.append(make())
                except (ImportError, OSError, RuntimeError, MicroAdamError) as error:
                    missing[contender] = str(error)
                    bar.advance(task, steps)
                if not in_turn and waiting:
                    timings += run(waiting)
                    waiting.clear()  # and its state is gone before the next one is made
            timings += run(waiting)
            waiting.clear()
            found.append(rows(workload.name, name, timings))
    return found, missing


def _print(
    found: Sequence[Sequence[Row]],
    together: Sequence[bool],
    missing: dict[str, str],
    output: Console,
    *,
    shows_host: bool,
) -> None:
    host_note = "; host: us until a step returns" if shows_host else ""
    for members, in_turn in zip(found, together, strict=True):
        table = Table(
            title=f"{members[0].workload} parameters, {members[0].dtype}",
            caption=f"Measured {WAYS[in_turn]}. ns per parameter: median, minimum; speed against {BASELINE}; state "
            "bytes per parameter; GB/s if one fused pass moved no more than it must; MB that a step takes and gives "
            f"back{host_note}",
            box=SIMPLE_HEAD,
        )
        table.add_column("", no_wrap=True)
        for title in ("ns", "min", "speed", "state", "GB/s", "MB", *(["host"] if shows_host else [])):
            table.add_column(title, justify="right")
        for row in members:
            extra = "?" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.1f}"
            numbers = (f"{row.ns_median:.3f}", f"{row.ns_min:.3f}", f"{row.speedup:.2f}x", f"{row.state_bytes:.2f}")
            host = [f"{row.host_us:.0f}"] if shows_host else []
            style = "bold" if row.contender.startswith("MicroAdam") else None
            table.add_row(row.contender, *numbers, f"{row.floor_rate / 1e9:.1f}", extra, *host, style=style)
        output.print(table)
    for contender, reason in missing.items():
        output.print(f"{contender}: {reason}", highlight=False, markup=False)
