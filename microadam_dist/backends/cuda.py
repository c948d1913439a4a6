"""The CUDA backend: the kernel in ``csrc/cuda``, one launch for all tensors of a group.

Nothing here waits for the device. The number of skipped blocks is counted there and returned as a tensor.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError, ConfigError
from ..layout import StateLayout
from . import nvrtc
from .base import TensorStep
from .cuda_launch import DTYPES, MAX_TENSORS, Plan, Shape, fill_launch, host_scalars, same_kernel, window_weights

MIN_CAPABILITY = (8, 0)  # conversions to bf16 and warp-wide sums in one instruction


class CudaBackend:
    """The fused kernel for tensors on NVIDIA GPUs.

    Raises:
        BackendUnavailableError: There is no GPU, or no compiler for the kernel; says what to do.
    """

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                'backend="cuda": torch sees no CUDA device. Use a CUDA build of torch on a machine with an NVIDIA GPU, '
                'or backend="auto".'
            )
        nvrtc.source_folder()
        major, _ = nvrtc.nvrtc_version()
        from cuda.bindings import driver

        self._driver = driver
        supported = self._call(driver.cuDriverGetVersion()) // 1000
        if major > supported:
            raise BackendUnavailableError(
                f'backend="cuda": the installed NVRTC is of CUDA {major}, the driver runs CUDA {supported} at most. '
                f"Update the driver, or pip install 'cuda-core[cu{supported}]'."
            )
        self._kernels: dict[Any, tuple[Any, Any]] = {}
        self._plans: dict[Any, Plan] = {}  # as long as their layouts live
        self._weights: dict[Any, Tensor] = {}

    def __reduce__(self) -> tuple[type[CudaBackend], tuple[()]]:
        return CudaBackend, ()

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
        """See `Backend.check`."""
        if device.type != "cuda":
            raise BackendUnavailableError(
                f'backend="cuda" cannot update a parameter on {device}: move it to a GPU or use backend="auto".'
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            raise BackendUnavailableError(
                f'backend="cuda" needs compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} has '
                f'{capability[0]}.{capability[1]}. Use backend="reference".'
            )
        if config.ef_bits != 4:
            raise ConfigError(f'ef_bits={config.ef_bits}: backend="cuda" has 4 only; backend="reference" has all.')

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int | Tensor:
        """See `Backend.step`."""
        if not tensors:
            return 0
        device = tensors[0].param.device
        self.check(config, device)
        grads = [tensor.grad if tensor.grad.dtype in DTYPES else tensor.grad.float() for tensor in tensors]
        groups = same_kernel(tensors, grads)
        num_runs = [sum(tensors[i].layout.num_runs for i in members) for members in groups]
        with torch.cuda.device(device):
            skipped = torch.zeros(len(groups), 1 + max(num_runs), dtype=torch.int32, device=device)
            for row, members in enumerate(groups):
                group = [tensors[i] for i in members]
                self._launch(group, [grads[i] for i in members], config, grad_scale, skipped[row])
            return skipped[:, 0].sum()

    def _launch(
        self,
        tensors: Sequence[TensorStep],
        grads: Sequence[Tensor],
        config: MicroAdamConfig,
        grad_scale: float,
        skipped: Tensor,
    ) -> None:
        layouts = [tensor.layout for tensor in tensors]
        longest = max((run.numel for layout in layouts for run in layout.runs), default=1)
        shape = Shape.for_blocks(longest)
        device = skipped.device
        plan = self._plan(layouts, shape, device)
        if plan.num_blocks == 0:
            return
        launch = fill_launch(plan, tensors, grads, self._window_weights(config, device), skipped)
        launch.scalars = host_scalars(tensors[0].step, config, grad_scale)
        macros = {
            "PARAM": DTYPES[tensors[0].param.dtype],
            "GRAD": DTYPES[grads[0].dtype],
            "MAX_KEPT": config.num_kept(longest),
            **kernel_macros(shape, config),
        }
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(launch))
        stream = torch.cuda.current_stream(device).cuda_stream
        grid, block = (plan.num_blocks, 1, 1), (shape.threads, 1, 1)
        kernel = self._kernel(macros, device)
        self._call(
            self._driver.cuLaunchKernel(kernel, *grid, *block, 0, stream, ctypes.addressof(parameters), 0)
        )
