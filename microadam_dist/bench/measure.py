"""Times steps in turn, and what a step needs in memory."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backends.cpu import CpuBackend
from ..errors import BackendUnavailableError
from .contenders import BASELINE, Contender

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Row:
    """The result of one contender. Times are those of a step, in nanoseconds per parameter.

    Attributes:
        workload: Name of the parameter shapes.
        dtype: Of weights and gradients.
        contender: Name of the optimizer.
        num_tensors, numel: What it updated; the reference backend gets fewer parameters.
        ns_median, ns_min: Over all rounds.
        host_us: Microseconds until a step returns, which on a GPU is before it has run; median.
        speedup: The baseline's time divided by its own, a parameter; median over the rounds.
        state_bytes: State, bytes per parameter.
        floor_bytes: What one fused pass over memory would move, bytes per parameter.
        floor_rate: Bytes a second that the median time means when only those are moved.
        peak_extra_bytes: Memory that a step takes and gives back; None where the system does not tell.
    """

    workload: str
    dtype: str
    contender: str
    num_tensors: int
    numel: int
    ns_median: float
    ns_min: float
    host_us: float
    speedup: float
    state_bytes: float
    floor_bytes: float
    floor_rate: float
    peak_extra_bytes: int | None


@dataclass(frozen=True)
class Timing:
    """What was seen of one contender, without what it holds.

    Attributes:
        name: Of the contender.
        num_tensors, numel: What it updated.
        seconds, host_seconds: Of each round, see `time_step`.
        state_bytes, floor_bytes: As of `Contender`.
        peak_extra_bytes: See `peak_extra_bytes`.
    """

    name: str
    num_tensors: int
    numel: int
    seconds: list[float]
    host_seconds: list[float]
    state_bytes: int
    floor_bytes: int
    peak_extra_bytes: int | None


def time_in_turn(
    contenders: Sequence[Contender], *, warmup: int, repeats: int, progress: Callable[[], None]
) -> list[Timing]:
    """Let contenders step in turn, so that a disturbance meets all of them.

    Args:
        contenders: One or several.
        warmup: Steps before those that count; the window must be full.
        repeats: Steps that count.
        progress: Called after every step; there are `num_steps` of them for each contender.
    """
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    peaks: dict[str, int | None] = {}
    for step in range(num_steps(warmup, repeats)):
        for contender in contenders:
            tensors = contender.tensors
            for param, grad in zip(tensors.params, tensors.gradients(step), strict=True):
                param.grad = grad
            device = tensors.params[0].device
            if step < warmup:
                contender.step()
            elif step == warmup:
                peaks[contender.name] = peak_extra_bytes(contender.step, device)
            else:
                times[contender.name].append(time_step(contender.step, device))
            progress()
    return [
        Timing(
            each.name,
            len(each.tensors.params),
            each.tensors.numel,
            [seconds for seconds, _ in times[each.name]],
            [host_seconds for _, host_seconds in times[each.name]],
            each.state_bytes(),
            each.floor_bytes(),
            peaks[each.name],
        )
        for each in contenders
    ]


def num_steps(warmup: int, repeats: int) -> int:
    """Steps of every contender: one of them shows the memory, and is not timed."""
    return warmup + 1 + repeats


def rows(workload: str, dtype: str, timings: Sequence[Timing]) -> list[Row]:
    """A line for each contender, the baseline among them; round by round their times are compared."""
    (base,) = (timing for timing in timings if timing.name == BASELINE)
    found = []
    for timing in timings:
        ns, base_ns = ([x * 1e9 / each.numel for x in each.seconds] for each in (timing, base))
        median, floor = statistics.median(ns), timing.floor_bytes / timing.numel
        found.append(
            Row(
                workload=workload,
                dtype=dtype,
                contender=timing.name,
                num_tensors=timing.num_tensors,
                numel=timing.numel,
                ns_median=median,
                ns_min=min(ns),
                host_us=statistics.median(timing.host_seconds) * 1e6,
                speedup=statistics.median(theirs / own for theirs, own in zip(base_ns, ns, strict=True)),
                state_bytes=timing.state_bytes / timing.numel,
                floor_bytes=floor,
                floor_rate=floor / median * 1e9,
                peak_extra_bytes=timing.peak_extra_bytes,
            )
        )
    return found


def time_step(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds of one step, on a GPU between two events on its stream; and seconds until it returned."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        host_seconds = _time(step)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3, host_seconds
    seconds = _time(step)
    return seconds, seconds


def _time(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def peak_extra_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a step takes and gives back. Resident memory of the process (Linux), or of torch's CUDA allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if not (_PROC / "clear_refs").exists():
        step()
        return None
    # What the C library keeps for later would hide what the step takes.
    ctypes.CDLL(None).malloc_trim(0)
    (_PROC / "clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in (_PROC / "status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def require_isa(name: str) -> None:
    """Raise a BackendUnavailableError if this machine does not have the instruction set."""
    CpuBackend(name)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it decides the times."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    found = {"type": "cpu", "name": _cpu_model(), "isa": None, "threads": torch.get_num_threads()}
    try:
        return found | {"isa": CpuBackend().isa}
    except BackendUnavailableError:
        return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
