"""The CUDA backend with the kernel's PTX in the place of the GPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from microadam_dist.backends import nvrtc

from .cuda_harness import SOURCES, HarnessBackend, Job
from .ptx import Kernel, Memory, ThreadBlock


def compile_with_lines(macros: Mapping[str, str | int], arch: str, folder: Path) -> bytes:
    """PTX (``compute_90``) or machine code (``sm_90``), otherwise as `nvrtc.compile_kernel`."""
    from cuda.bindings import nvrtc as bindings

    options = nvrtc.compile_options(macros, arch, folder)
    options.lineinfo = True
    arguments = options.as_bytes("nvrtc")
    source = (folder / nvrtc.SOURCE_NAME).read_bytes()
    _, program = bindings.nvrtcCreateProgram(source, nvrtc.SOURCE_NAME.encode(), 0, [], [])
    (error,) = bindings.nvrtcCompileProgram(program, len(arguments), arguments)
    assert error == bindings.nvrtcResult.NVRTC_SUCCESS
    kind = "PTX" if arch.startswith("compute") else "CUBIN"
    _, size = getattr(bindings, f"nvrtcGet{kind}Size")(program)
    code = b" " * size
    getattr(bindings, f"nvrtcGet{kind}")(program, code)
    bindings.nvrtcDestroyProgram(program)
    return code


@functools.cache
def kernels(macros: frozenset[tuple[str, str | int]], arch: str, folder: Path) -> tuple[Kernel, Kernel]:
    """The scalars' kernel and that of the step."""
    ptx = compile_with_lines(dict(macros), arch, folder).decode()
    return Kernel(ptx, "microadam_scalars"), Kernel(ptx, "microadam_step")


class PtxBackend(HarnessBackend):
    """Runs the kernel's PTX.

    Args:
        arch: What it is compiled for.
        warp_by_warp: See `ThreadBlock`.
        sources: Another copy of ``csrc/cuda``.
    """

    def __init__(self, arch: str = "compute_90", warp_by_warp: bool = False, sources: Path = SOURCES) -> None:
        super().__init__(sources=sources)
        self._arch, self._warp_by_warp = arch, warp_by_warp

    def _run(self, job: Job) -> None:
        scalars, step = kernels(frozenset(job.macros.items()), self._arch, self._sources)
        parts, param = global_memory(job.memory), bytes(job.launch)
        if job.counts:
            ThreadBlock(scalars, 32, 0, param, parts).run()
        for index in range(job.tables.num_blocks):
            ThreadBlock(step, job.tables.shape.threads, index, param, parts, self._warp_by_warp).run()


def global_memory(tensors: Sequence[torch.Tensor]) -> Memory:
    """That of these tensors."""
    regions = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return Memory(
        [(at, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(at))) for at, size in regions.items()]
    )
