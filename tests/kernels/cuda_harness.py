"""The CUDA kernel on the CPU: its own source, compiled by a C++ compiler, one fiber a CUDA thread."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from microadam_dist.backends.base import DeviceInputs, TensorStep, count_steps, readable_grads
from microadam_dist.backends.cuda_launch import (
    SCALARS_BYTES,
    Launch,
    Plan,
    Shape,
    device_inputs,
    fill_launch,
    group_by_kernel,
    host_scalars,
    kernel_macros,
    step_factors,
    window_weights,
)
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import StateLayout

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# One build runs all settings.
BUILT_FOR = ("PARAM", "GRAD", "REPLAY", "THREADS", "CHUNKS", "MAX_TENSORS")
_builds = tempfile.TemporaryDirectory(prefix="microadam-harness-")


@functools.cache
def build(sources: Path, **macros: str | int) -> ctypes.CDLL:
    """Compile the harness for these macros of ``microadam.cu``."""
    assert COMPILER is not None
    library = Path(_builds.name, f"{len(list(Path(_builds.name).iterdir()))}.so")
    flags = "-std=c++17 -O1 -ffp-contract=off -w -fPIC -shared".split()
    defines = [f"-DMICROADAM_{name}={value}" for name, value in macros.items()]
    source = sources / "harness" / "harness.cpp"
    command = [COMPILER, *flags, "-DMICROADAM_HARNESS", *defines, "-o", str(library), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    loaded.harness_scalars.argtypes = [ctypes.POINTER(Launch)]
    loaded.harness_step.argtypes = [ctypes.POINTER(Launch), ctypes.c_uint, *(ctypes.c_int,) * 4]
    assert loaded.harness_launch_bytes() == ctypes.sizeof(Launch)
    return loaded


def copy_with_mistake(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of the sources with one place changed."""
    sources = folder / "cuda"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    return sources


class HarnessBackend:
    """Runs the kernel with the tables of the CUDA backend.

    Args:
        reverse: The threads take turns from the last to the first.
        threads: Instead of the shape the CUDA backend would take, one with so many threads.
        sources: Another copy of ``csrc/cuda``.
    """

    name = "harness"

    def __init__(self, reverse: bool = False, threads: int | None = None, sources: Path = SOURCES) -> None:
        self._reverse, self._threads, self._sources = reverse, threads, sources

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
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
        for members in group_by_kernel(tensors, grads):
            group, group_grads = [tensors[i] for i in members], [grads[i] for i in members]
            plan = self._plan([tensor.layout for tensor in group])
            skipped = torch.zeros(1 + plan.num_runs, dtype=torch.int32)
            launch = fill_launch(plan, group, group_grads, weights, skipped, skipped[1:])
            launch.scalars = host_scalars(group[0].step, config, grad_scale)
            grad_dtype = None if group_grads[0] is None else group_grads[0].dtype
            macros = kernel_macros(plan, config, group[0].param.dtype, grad_dtype)
            memory = [plan.runs, plan.first_runs, weights, skipped]
            if inputs is not None:
                factors = step_factors(config, cpu)
                scalars = torch.zeros(len(group) * SCALARS_BYTES, dtype=torch.uint8)
                launch.inputs = device_inputs(inputs, config, factors)
                launch.device_scalars = scalars.data_ptr()
                memory += [
                    factors,
                    scalars,
                    *(x for x in (inputs.lr, inputs.loss_scale, inputs.found_inf) if x is not None),
                ]
            for tensor, grad in zip(group, group_grads, strict=True):
                memory += [x for x in (tensor.param, grad, tensor.counter) if x is not None]
                memory += tensor.state.values()
            self._run(launch, plan, macros, memory)
            num_skipped += int(skipped[0])
        return num_skipped

    def _run(self, launch: Launch, plan: Plan, macros: Mapping[str, str | int], memory: Sequence[torch.Tensor]) -> None:
        """Run the kernels of one launch, which may touch these tensors only."""
        library = build(self._sources, **{name: macros[name] for name in BUILT_FOR})
        if launch.device_scalars:
            library.harness_scalars(ctypes.byref(launch))
        settings = (*(macros[name] for name in ("WINDOW_SIZE", "BUCKET_SIZE", "PACKED_WINDOW")), self._reverse)
        assert library.harness_step(ctypes.byref(launch), plan.num_blocks, *settings), "threads wait for ever"

    def _plan(self, layouts: Sequence[StateLayout]) -> Plan:
        plan = Plan(layouts, torch.device("cpu"))
        if self._threads is None:
            return plan
        shape = Shape(self._threads, -(-plan.longest // Shape(self._threads, 1).capacity))
        return Plan(layouts, torch.device("cpu"), shape)
