"""The CPU backend: the kernel in ``csrc/cpu``, a plain shared library called through ctypes.

One call updates all tensors of a group. The tables it is given mirror ``csrc/cpu/microadam_cpu.h``.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.rounding import is_stochastic, step_key
from ..arithmetic.scalars import StepScalars
from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError, ConfigError
from ..layout import StateLayout, num_levels
from . import __path__ as _FOLDERS  # an editable install has two: the sources and what was built
from .base import TensorStep
from .structures import EXTENT_FIELDS, FloatScalars, Place, extents_of, float_values, place_of
from .tensors import Addresses, pack_rows, readable_grads

ABI_VERSION = 8
LIBRARY_NAME = "libmicroadam_cpu.so"
_BUILD_AGAIN = (
    "In a checkout `pip install --no-deps --force-reinstall .` builds it where there is a compiler; a wheel has it."
)
ISAS = {"portable": 0, "avx2": 1, "avx512": 2}  # slowest first

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _BlockRun(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "cols", "numel", "num_kept")),
        ("place", Place),
        *EXTENT_FIELDS,
    ]


class _DenseRun(Structure):
    _fields_ = [("start", c_int64), ("numel", c_int64), ("state_start", c_int64), ("place", Place)]


class _Scalars(FloatScalars):
    _fields_ = [
        ("m_weights", POINTER(c_float)),
        ("v_weights", POINTER(c_float)),
        ("num_weights", c_int64),
        ("newest_slot", c_int64),
        ("step_key", c_int64),
    ]


class _Settings(Structure):
    _fields_ = [(name, c_int64) for name in ("window_size", "bucket_size", "packed_window", "levels")]


class _LayoutFields(Structure):
    _fields_ = [
        ("block_runs", POINTER(_BlockRun)),
        ("dense_runs", POINTER(_DenseRun)),
        ("num_block_runs", c_int64),
        ("num_dense_runs", c_int64),
    ]


class _Layout:
    """One layout as the kernel reads it; it never changes."""

    def __init__(self, layout: StateLayout) -> None:
        places = [place_of(span) for span in layout.spans]
        blocks = (_BlockRun * len(layout.runs))(
            *(
                _BlockRun(run.rows, run.cols, run.numel, run.num_kept, places[run.span_index], *extents_of(run))
                for run in layout.runs
            )
        )
        dense = (_DenseRun * len(layout.dense_runs))(
            *(_DenseRun(run.start, run.numel, run.state_start, places[run.span_index]) for run in layout.dense_runs)
        )
        self._fields = _LayoutFields(blocks, dense, len(blocks), len(dense))
        self.address = ctypes.addressof(self._fields)


class CpuBackend:
    """The fused kernel for tensors in host memory.

    Args:
        isa: ``"avx512"``, ``"avx2"`` or ``"portable"`` instead of the best one this machine has; also taken from the
            environment variable ``MICROADAM_CPU_ISA``.
        num_threads: Instead of torch's own number of threads. The result does not depend on it.

    Raises:
        BackendUnavailableError: The kernel is not installed.
        ConfigError: This machine or build does not have the instruction set asked for.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None, num_threads: int | None = None) -> None:
        self._library = load_library()
        self._requested = (isa, num_threads)
        self.isa = _select_isa(isa or os.environ.get("MICROADAM_CPU_ISA"))
        self._num_threads = num_threads
        self._layouts: dict[int, _Layout] = {}  # by id of the layout, as long as it lives

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._requested

    @property
    def num_threads(self) -> int:
        """Threads of a step: torch's own number, unless another was asked for."""
        return self._num_threads or torch.get_num_threads()

    @property
    def threading(self) -> str:
        """``"openmp"``: the threads are torch's own; ``"std::thread"``: they are started for every step."""
        return str(self._library.microadam_cpu_threading().decode())

    def check(self, device: torch.device) -> None:
        """See `Backend.check`."""
        if device.type != "cpu":
            raise BackendUnavailableError(
                f'backend="cpu" cannot update a parameter on {device}: move it to the CPU or use backend="auto".'
            )

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        """See `Backend.step`."""
        if not tensors:
            return 0
        self.check(tensors[0].param.device)
        steps = {tensor.step for tensor in tensors}
        scalars = {step: _scalars(step, config, grad_scale) for step in steps}  # alive until the call is over, as grads
        grads = readable_grads(tensors)
        levels = num_levels(config.ef_bits)
        settings = _Settings(config.window_size, config.bucket_size, config.packed_window, levels)
        addresses = {step: ctypes.addressof(members) for step, members in scalars.items()}
        table = self._table(tensors, grads, addresses, config.rounding)
        num_skipped = self._library.microadam_cpu_step(
            byref(settings), table, len(tensors), ISAS[self.isa], self.num_threads
        )
        if num_skipped < 0:
            raise MemoryError("the CPU kernel could not allocate its scratch memory; nothing has been changed.")
        return int(num_skipped)

    def _table(
        self, tensors: Sequence[TensorStep], grads: Sequence[Tensor | None], scalars: Mapping[int, int], rounding: str
    ) -> bytes:
        """One microadam_tensor per tensor, from the address of the scalars by step."""
        for tensor in tensors:
            if id(tensor.layout) not in self._layouts:
                self._add_layout(tensor.layout)
        addresses = Addresses.of(tensors, grads)
        dtypes = [tensor.param.dtype for tensor in tensors]
        stochastic = {dtype: int(is_stochastic(rounding, dtype)) for dtype in set(dtypes)}
        fields = [
            [self._layouts[id(tensor.layout)].address for tensor in tensors],
            [scalars[tensor.step] for tensor in tensors],
            addresses.param,
            addresses.grad,
            addresses.counter,
            *addresses.state,
            [_DTYPES[dtype] for dtype in dtypes],
            [_DTYPES[torch.float32 if grad is None else grad.dtype] for grad in grads],
            [stochastic[dtype] for dtype in dtypes],
        ]
        return pack_rows(fields)

    def _add_layout(self, layout: StateLayout) -> None:
        key = id(layout)  # to hash a layout takes longer than to update a small tensor
        self._layouts[key] = _Layout(layout)
        weakref.finalize(layout, self._layouts.pop, key, None).atexit = False


@functools.lru_cache(maxsize=8)  # an engine that updates parameter by parameter asks for the same ones again and again
def _scalars(step: int, config: MicroAdamConfig, grad_scale: float) -> _Scalars:
    scalars = StepScalars.at(step, config, grad_scale)
    num_weights = len(scalars.m_weights)
    weights = c_float * num_weights
    return _Scalars(
        *float_values(scalars),
        weights(*scalars.m_weights),
        weights(*scalars.v_weights),
        num_weights,
        step % config.window_size,
        step_key(config.seed, step),
    )


def _library_path() -> Path | None:
    """Where the library lies; the environment variable ``MICROADAM_CPU_LIBRARY`` names another build of it."""
    override = os.environ.get("MICROADAM_CPU_LIBRARY")
    if override:
        return Path(override)
    candidates = [Path(folder, LIBRARY_NAME) for folder in _FOLDERS]
    return next((path for path in candidates if path.exists()), None)


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the kernel.

    Raises:
        BackendUnavailableError: Says why it cannot be loaded and what to do.
    """
    path = _library_path()
    if path is None:
        raise BackendUnavailableError(
            f'backend="cpu": {LIBRARY_NAME} is not installed. It is built when the package is installed on Linux or '
            f'macOS and there is a C++ compiler (GCC or Clang). {_BUILD_AGAIN} Or use backend="reference".'
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.microadam_cpu_abi_version()
    except (OSError, AttributeError) as error:
        raise BackendUnavailableError(f'backend="cpu": cannot load {path}: {error}. {_BUILD_AGAIN}') from error
    if version != ABI_VERSION:
        raise BackendUnavailableError(
            f'backend="cpu": {path} has interface {version}, expected {ABI_VERSION}: it was built from another version '
            f"of the sources. {_BUILD_AGAIN}"
        )
    library.microadam_cpu_threading.restype = c_char_p
    library.microadam_cpu_step.restype = c_int64
    library.microadam_cpu_step.argtypes = [POINTER(_Settings), c_void_p, c_int64, c_int, c_int]
    return library


def available_isas() -> list[str]:
    """The instruction sets the kernel has code for and this machine runs, slowest first.

    Raises:
        BackendUnavailableError: The kernel is not installed.
    """
    library = load_library()
    return [name for name, number in ISAS.items() if library.microadam_cpu_has_isa(number)]


def _select_isa(wanted: str | None) -> str:
    available = available_isas()
    if wanted is None:
        return available[-1]
    if wanted not in available:
        raise ConfigError(
            f"the CPU kernel was asked for instruction set {wanted!r}; this machine and build have "
            f"{', '.join(available)}."
        )
    return wanted
