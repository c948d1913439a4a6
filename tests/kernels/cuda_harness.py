"""The CUDA kernel on the CPU: its own source, compiled by a C++ compiler, one fiber for each CUDA thread."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from microadam_dist.backends.base import DeviceInputs, TensorStep
from microadam_dist.backends.cuda_launch import (
    SCALARS_BYTES,
    FilledLaunch,
    Launch,
    LaunchTables,
    Shape,
    address_rows,
    are_aligned,
    device_inputs,
    group_by_kernel,
    host_scalars,
    kernel_macros,
    launch_tables,
    step_factors,
    window_weights,
)
from microadam_dist.backends.tensors import addresses_of, count_steps, readable_grads
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import StateLayout

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")
_builds = tempfile.TemporaryDirectory(prefix="microadam-harness-")


@functools.cache
def build(source: Path, macros: frozenset[tuple[str, str | int]] = frozenset()) -> ctypes.CDLL:
    """Compile a file of the harness for these macros of ``settings.cuh``."""
    assert COMPILER is not None
    library = Path(_builds.name, f"{len(list(Path(_builds.name).iterdir()))}.so")
    flags = "-std=c++17 -O1 -ffp-contract=off -w -fPIC -shared -DMICROADAM_HARNESS".split()
    defines = [f"-DMICROADAM_{name}={value}" for name, value in macros]
    subprocess.run([COMPILER, *flags, *defines, "-o", library, source], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(library))


def build_step(sources: Path, macros: Mapping[str, str | int]) -> ctypes.CDLL:
    """The whole step."""
    library = build(sources / "harness" / "harness.cpp", frozenset(macros.items()))
    library.harness_scalars.argtypes = [ctypes.POINTER(Launch)]
    library.harness_step.argtypes = [ctypes.POINTER(Launch), ctypes.c_uint, ctypes.c_int]
    assert library.harness_launch_bytes() == ctypes.sizeof(Launch)
    return library


def copy_with_mistake(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of the sources with one place changed."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    return sources


class Job(NamedTuple):
    """One launch: the kernel of the step, and before it that of the scalars where it ``counts``.

    Attributes:
        memory: What the kernels may touch.
    """

    launch: Launch
    tables: LaunchTables
    macros: Mapping[str, str | int]
    memory: Sequence[torch.Tensor]
    counts: bool


class HarnessBackend:
    """Runs the kernel with the tables and the settings of the CUDA backend.

    Args:
        reverse: The threads take turns from the last to the first.
        cramped: One warp for every block, each thread with more chunks, and too little shared memory for the window
            and for what is kept.
        sources: Another copy of ``csrc/cuda``.
    """

    name = "harness"

    def __init__(self, reverse: bool = False, cramped: bool = False, sources: Path = SOURCES) -> None:
        self._reverse, self._cramped, self._sources = reverse, cramped, sources

    def check(self, device: torch.device) -> None:
        pass

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        num_skipped = self._step(tensors, config, grad_scale, None)
        count_steps(tensors)
        return num_skipped

    def step_on_device(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, inputs: DeviceInputs) -> int:
        return self._step(tensors, config, 1.0, inputs)

    def _step(
        self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float, inputs: DeviceInputs | None
    ) -> int:
        cpu = torch.device("cpu")
        grads = readable_grads(tensors)
        weights = window_weights(config, cpu)
        num_skipped = 0
        rows = address_rows(tensors, grads)
        aligned = are_aligned(rows)
        for members in group_by_kernel(tensors, grads, aligned):
            group, group_grads = [tensors[i] for i in members], [grads[i] for i in members]
            on_device = torch.zeros(len(group) * SCALARS_BYTES, dtype=torch.uint8)
            for number, tables in enumerate(self._tables([tensor.layout for tensor in group], aligned[members[0]])):
                skipped = torch.zeros(1 + tables.num_runs, dtype=torch.int32)
                scalars = host_scalars(group[0].step, config, grad_scale)
                filled = FilledLaunch(tables, [rows[i] for i in members])
                launch = filled.fill(scalars, weights, skipped, skipped[1:], addresses_of(group_grads))
                grad_dtype = None if group_grads[0] is None else group_grads[0].dtype
                macros = kernel_macros(tables, config, group[0].param.dtype, grad_dtype)
                memory = [tables.runs, tables.first_runs, weights, skipped]
                if inputs is not None:
                    factors = step_factors(config, cpu)
                    launch.inputs = device_inputs(inputs, config, factors)
                    launch.device_scalars = on_device.data_ptr()
                    memory += [
                        factors,
                        on_device,
                        *(x for x in (inputs.lr, inputs.loss_scale, inputs.found_inf) if x is not None),
                    ]
                for tensor, grad in zip(group, group_grads, strict=True):
                    memory += [x for x in (tensor.param, grad, tensor.counter) if x is not None]
                    memory += tensor.state.values()
                self._run(Job(launch, tables, macros, memory, counts=inputs is not None and number == 0))
                num_skipped += int(skipped[0])
        return num_skipped

    def _run(self, job: Job) -> None:
        launch, tables = job.launch, job.tables
        library = build_step(self._sources, {**job.macros, "CRAMPED": 1} if self._cramped else job.macros)
        if job.counts:
            library.harness_scalars(ctypes.byref(launch))
        assert library.harness_step(ctypes.byref(launch), tables.num_blocks, self._reverse), "threads wait for ever"

    def _tables(self, layouts: Sequence[StateLayout], is_aligned: bool) -> list[LaunchTables]:
        longest = max((run.numel for layout in layouts for run in layout.runs), default=1)
        shape = Shape(32, -(-longest // Shape(32).capacity)) if self._cramped else None
        return launch_tables(layouts, is_aligned, torch.device("cpu"), shape)
