"""The CUDA backend: the kernel in ``csrc/cuda``, one launch for all tensors of a group.

Nothing here waits for the device. The number of skipped blocks is counted there and returned as a tensor.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError
from ..layout import StateLayout
from . import nvrtc
from .base import DeviceInputs, TensorStep
from .cuda_launch import (
    SCALARS_BYTES,
    FilledLaunch,
    Launch,
    LaunchTables,
    address_rows,
    are_aligned,
    device_inputs,
    group_by_kernel,
    host_scalars,
    kernel_macros,
    launch_tables,
    signature_of,
    step_factors,
    window_weights,
)
from .tensors import addresses_of, count_steps, readable_grads

MIN_CAPABILITY = (8, 0)  # conversions to bf16 and warp-wide sums in one instruction
KERNEL_NAMES = ("microadam_scalars", "microadam_step")
MAX_LAUNCH_TABLES = 1024  # where other tensors have gradients in every step
COUNTS_AT_ONCE = 256  # numbers of skipped blocks that are allocated together


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
        self._prepared: dict[Any, Sequence[_Prepared]] = {}  # this and the next as long as their layouts live
        self._calls: dict[Any, tuple[Any, Sequence[_Call]]] = {}
        self._captured: set[LaunchTables] = set()  # a CUDA graph needs them
        self._constants: dict[Any, Tensor] = {}
        self._compiled: dict[Any, dict[str, Any]] = {}
        self._counts: dict[Any, list[Tensor]] = {}  # zeros, by stream

    def __reduce__(self) -> tuple[type[CudaBackend], tuple[()]]:
        return CudaBackend, ()

    def describe(self) -> str:
        """The devices, the compiler and where compiled kernels are kept."""
        devices = []
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
        version = ".".join(map(str, nvrtc.nvrtc_version()))
        return f"{', '.join(devices)}; NVRTC {version}, kernels kept in {nvrtc.cache_folder()}"

    def check(self, device: torch.device) -> None:
        """See `Backend.check`."""
        if device.type != "cuda":
            raise BackendUnavailableError(
                f'backend="cuda" cannot update a parameter on {device}: move it to a GPU or use backend="auto".'
            )
        capability = _capability(torch.cuda.current_device() if device.index is None else device.index)
        if capability < MIN_CAPABILITY:
            raise BackendUnavailableError(
                f'backend="cuda" needs compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} has '
                f'{capability[0]}.{capability[1]}. Use backend="reference".'
            )

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int | Tensor:
        """See `Backend.step`."""
        num_skipped = self._step(tensors, config, grad_scale, None)
        count_steps(tensors)
        return num_skipped

    def step_on_device(
        self, tensors: Sequence[TensorStep], config: MicroAdamConfig, inputs: DeviceInputs
    ) -> int | Tensor:
        """See `CapturableBackend.step_on_device`.

        Tables are made in the first step with the same tensors; take one before the capture.
        """
        return self._step(tensors, config, 1.0, inputs)

    def _step(
        self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float, inputs: DeviceInputs | None
    ) -> int | Tensor:
        if not tensors:
            return 0
        device = tensors[0].param.device
        self.check(device)
        # To switch to the device where it is the current one already takes longer than to ask.
        if torch.cuda.current_device() == device.index:
            return self._step_on(device, tensors, config, grad_scale, inputs)
        with torch.cuda.device(device):
            return self._step_on(device, tensors, config, grad_scale, inputs)

    def _step_on(
        self,
        device: torch.device,
        tensors: Sequence[TensorStep],
        config: MicroAdamConfig,
        grad_scale: float,
        inputs: DeviceInputs | None,
    ) -> Tensor:
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # `current_stream` makes an object: longer
        # A captured step counts from zero at every replay.
        skipped = self._count(device, stream) if inputs is None else torch.zeros((), dtype=torch.int32, device=device)
        grads = readable_grads(tensors)
        addresses = addresses_of(grads)
        for call in self._calls_for(tensors, grads, addresses, device):
            own = addresses if len(call.members) == len(addresses) else [addresses[i] for i in call.members]
            self._launch(call, tensors[call.members[0]], own, config, grad_scale, inputs, skipped, stream)
        return skipped

    def _launch(
        self,
        call: _Call,
        first: TensorStep,
        grads: Sequence[int],
        config: MicroAdamConfig,
        grad_scale: float,
        inputs: DeviceInputs | None,
        skipped: Tensor,
        stream: int,
    ) -> None:
        device, dtype, grad_dtype = first.param.device, first.param.dtype, call.grad_dtype
        key = config.rounding, dtype, grad_dtype  # what else decides about the code is the same in all layouts
        weights, scalars = self._weights(config, device), host_scalars(first.step, config, grad_scale)
        on_device = (
            None if inputs is None else torch.empty(len(grads) * SCALARS_BYTES, dtype=torch.uint8, device=device)
        )
        for number, (tables, all_kernels, filled) in enumerate(call.launches):
            if (kernels := all_kernels.get(key)) is None:
                kernels = all_kernels[key] = self._kernels(kernel_macros(tables, config, dtype, grad_dtype), device)
            flags = torch.zeros(tables.num_runs, dtype=torch.int32, device=device) if tables.has_dense_runs else None
            launch = filled.fill(scalars, weights, skipped, flags, grads)
            if inputs is not None and on_device is not None:
                launch.inputs = device_inputs(inputs, config, self._factors(config, device))
                launch.device_scalars = on_device.data_ptr()
                if number == 0:  # it counts the step
                    self._run(kernels["microadam_scalars"], -(-len(grads) // 32), 32, launch, stream)
            self._run(kernels["microadam_step"], tables.num_blocks, tables.shape.threads, launch, stream)

    def _run(self, kernel: Any, num_blocks: int, num_threads: int, launch: Launch, stream: int) -> None:
        parameters = _Parameters(ctypes.addressof(launch))  # copied by the call
        shape = (num_blocks, 1, 1, num_threads, 1, 1)
        self._call(self._driver.cuLaunchKernel(kernel, *shape, 0, stream, ctypes.addressof(parameters), 0))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """What a driver function returned beside its error code."""
        error, *values = result
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver returned {error!r}")
        return values[0] if values else None

    # ---------------------------------------------------------------- what is made once

    def _calls_for(
        self,
        tensors: Sequence[TensorStep],
        grads: Sequence[Tensor | None],
        addresses: Sequence[int],
        device: torch.device,
    ) -> Sequence[_Call]:
        """The calls for these tensors: those of the step before, if nothing but scalars and gradients has changed."""
        layouts = [tensor.layout for tensor in tensors]
        key = (device, *map(id, layouts))  # to hash layouts takes long
        signature, known = signature_of(tensors, grads, addresses), self._calls.get(key)
        # What a CUDA graph needs is kept by `_prepare`.
        if known is not None and known[0] == signature and not torch.cuda.is_current_stream_capturing():
            return known[1]
        if known is None:
            _make_room(self._calls, key, layouts)
        calls = self._make_calls(tensors, grads, device)
        self._calls[key] = signature, calls
        return calls

    def _make_calls(
        self, tensors: Sequence[TensorStep], grads: Sequence[Tensor | None], device: torch.device
    ) -> Sequence[_Call]:
        calls, rows = [], address_rows(tensors, grads)
        aligned = are_aligned(rows)
        for members in group_by_kernel(tensors, grads, aligned):
            prepared = self._prepare([tensors[i].layout for i in members], aligned[members[0]], device)
            own, grad = [rows[i] for i in members], grads[members[0]]
            launches = [_Launch(tables, kernels, FilledLaunch(tables, own)) for tables, kernels in prepared]
            calls.append(_Call(members, None if grad is None else grad.dtype, launches))
        return calls

    def _prepare(self, layouts: Sequence[StateLayout], is_aligned: bool, device: torch.device) -> Sequence[_Prepared]:
        key = (device, is_aligned, *map(id, layouts))  # to hash layouts takes long
        if (prepared := self._prepared.get(key)) is None:
            _refuse_capture()
            _make_room(self._prepared, key, layouts)
            tables = launch_tables(layouts, is_aligned, device)
            prepared = self._prepared[key] = [_Prepared(t, {}) for t in tables if t.num_blocks]
        if torch.cuda.is_current_stream_capturing():
            self._captured.update(tables for tables, _ in prepared)
        return prepared

    def _count(self, device: torch.device, stream: int) -> Tensor:
        """A zero, 0-dim int32. One allocation and one kernel make many, in the order of this stream."""
        key = device, stream
        if not self._counts.get(key):
            self._counts[key] = list(torch.zeros(COUNTS_AT_ONCE, dtype=torch.int32, device=device).unbind())
        return self._counts[key].pop()

    def _weights(self, config: MicroAdamConfig, device: torch.device) -> Tensor:
        return self._constant(
            ("weights", config.betas, config.window_size, device), lambda: window_weights(config, device)
        )

    def _factors(self, config: MicroAdamConfig, device: torch.device) -> Tensor:
        key = "factors", config.betas, config.correction, config.window_size, device
        return self._constant(key, lambda: step_factors(config, device))

    def _constant(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._constants:
            _refuse_capture()
            self._constants[key] = make()
        return self._constants[key]

    def _kernels(self, macros: Mapping[str, str | int], device: torch.device) -> dict[str, Any]:
        key = (device, *macros.values())
        if key not in self._compiled:
            _refuse_capture()
            major, minor = _capability(device.index)
            module = self._call(self._driver.cuModuleLoadData(nvrtc.compile_kernel(macros, f"sm_{major}{minor}")))
            self._compiled[key] = {
                name: self._call(self._driver.cuModuleGetFunction(module, name.encode())) for name in KERNEL_NAMES
            }
        return self._compiled[key]


_Parameters = ctypes.c_void_p * 1


class _Prepared(NamedTuple):
    """For a launch for tensors of the same layouts."""

    tables: LaunchTables
    kernels: dict[Any, dict[str, Any]]


class _Launch(NamedTuple):
    """One of the launches of a call."""

    tables: LaunchTables
    kernels: dict[Any, dict[str, Any]]
    filled: FilledLaunch


class _Call(NamedTuple):
    """What is launched for the tensors at some positions, of the same dtypes, step and alignment."""

    members: Sequence[int]
    grad_dtype: torch.dtype | None
    launches: Sequence[_Launch]


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _make_room(cache: dict[Any, Any], key: Any, layouts: Sequence[StateLayout]) -> None:
    """For what is kept of these layouts as long as they live."""
    if len(cache) == MAX_LAUNCH_TABLES:
        cache.pop(next(iter(cache)))
    for layout in layouts:
        weakref.finalize(layout, cache.pop, key, None).atexit = False


def _refuse_capture() -> None:
    """Copies to the device and new kernels cannot be part of a CUDA graph."""
    if torch.cuda.is_current_stream_capturing():
        raise BackendUnavailableError(
            'backend="cuda": the first step with these tensors and settings compiles a kernel and fills tables. Take '
            "at least one step before the CUDA graph is captured."
        )
