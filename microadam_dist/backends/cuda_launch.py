"""What one launch of the CUDA kernel is given: ctypes mirrors of ``csrc/cuda/launch.cuh``, and how they are filled."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import struct
from array import array
from collections.abc import Iterable, Sequence
from ctypes import Structure, c_double, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.rounding import is_stochastic, mix, step_key
from ..arithmetic.scalars import BiasFactors, StepScalars
from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..layout import BlockRun, DenseRun, StateLayout, num_levels
from .base import DeviceInputs, TensorStep
from .structures import EXTENT_FIELDS, FloatScalars, Place, extents_of, float_values, place_of
from .tensors import STATE_NAMES, Addresses

MAX_TENSORS = 256  # so that a launch's parameters stay below 32 KiB
RUN_SHIFT = 6  # runs are found by block number >> RUN_SHIFT
VECTOR = 16  # elements a thread reads and writes at once
WARP = 32
MAX_WARPS = 8  # of a thread block
DTYPES = {torch.float32: "Fp32", torch.bfloat16: "Bf16", torch.float16: "Fp16"}


class Run(Structure):
    """Top-K blocks of one length, or an interval on the dense path."""

    _fields_ = [
        *((name, c_int64) for name in ("first_block", "tensor", "numel", "num_kept", "cols")),
        ("place", Place),
        *EXTENT_FIELDS,
    ]


class _Tensor(Structure):
    _fields_ = [*((name, c_void_p) for name in ("param", "grad", *STATE_NAMES, "step"))]


class _Scalars(FloatScalars):
    _fields_ = [*((name, c_int32) for name in ("num_weights", "newest_slot", "is_skipped")), ("step_key", c_uint32)]


SCALARS_BYTES = ctypes.sizeof(_Scalars)


class _DeviceInputs(Structure):
    _fields_ = [
        *((name, c_double) for name in ("lr", "weight_decay")),
        *((name, c_void_p) for name in ("lr_fp32", "lr_fp64", "loss_scale", "found_inf", "factors")),
        *((name, c_int64) for name in ("num_factors", "window_size", "mixed_seed")),
    ]


class Launch(Structure):
    """The only parameter of the kernels."""

    _fields_ = [
        ("scalars", _Scalars),
        ("device_scalars", c_void_p),
        ("inputs", _DeviceInputs),
        *((name, c_void_p) for name in ("m_weights", "v_weights", "runs", "first_runs", "num_skipped", "dense_flags")),
        ("num_tensors", c_int64),
        ("tensors", _Tensor * MAX_TENSORS),
    ]


@dataclass(frozen=True)
class Shape:
    """Threads of a thread block and chunks of `VECTOR` elements that each of them holds."""

    threads: int
    chunks: int = 1

    @property
    def capacity(self) -> int:
        """Elements of the longest Top-K block."""
        return self.threads * self.chunks * VECTOR

    @property
    def min_blocks(self) -> int:
        """Thread blocks that shall fit a multiprocessor at once: 1024 threads, fewer where they need more registers."""
        return max(1, 1024 // (self.threads * self.chunks))

    @classmethod
    def for_blocks(cls, longest: int) -> Shape:
        """The smallest shape that holds blocks of up to ``longest`` elements: more than 256 threads hold two chunks."""
        warps = -(-longest // (WARP * VECTOR))
        chunks = next(chunks for chunks in (1, 2, 4, 8) if warps <= chunks * MAX_WARPS)
        return cls(WARP * -(-warps // chunks), chunks)


class LaunchTables:
    """What is the same in every launch for some blocks of the same tensors.

    Attributes:
        shape: Of the thread blocks.
        is_aligned: Whether vectors can be read and written.
        longest: Elements of the longest Top-K block; 1 if there is none.
        length: That of all of them, or 0 where it is not the same.
        num_blocks: Thread blocks of a launch.
        num_runs: Runs of Top-K blocks and of the dense path.
        has_dense_runs: Whether some are of the dense path.
        runs, first_runs: Tables on the device, as uint8; see ``launch.cuh``.
    """

    def __init__(
        self,
        layouts: Sequence[StateLayout],
        sparse_runs: Sequence[tuple[int, BlockRun]],
        dense_runs: Sequence[tuple[int, DenseRun]],
        shape: Shape,
        is_aligned: bool,
        device: torch.device,
    ) -> None:
        lengths = {run.numel for _, run in sparse_runs}
        self.shape, self.is_aligned, self.has_dense_runs = shape, is_aligned, bool(dense_runs)
        self.longest = max(lengths, default=1)
        self.length = self.longest if len(lengths) == 1 else 0
        runs: list[Run] = []
        self.num_blocks = 0
        for index, run in sparse_runs:
            cols, place = 0 if run.is_gapless else run.cols, place_of(layouts[index].spans[run.span_index])
            runs.append(Run(self.num_blocks, index, run.numel, run.num_kept, cols, place, *extents_of(run)))
            self.num_blocks += run.num_blocks
        for index, dense in dense_runs:
            runs.append(
                Run(self.num_blocks, index, dense.numel, place=place_of(layouts[index].spans[dense.span_index]))
            )
            runs[-1].elements.start, runs[-1].values.start = dense.start, dense.state_start
            self.num_blocks += -(-dense.numel // shape.capacity)
        self.num_runs = len(runs)
        self.runs = _to_device((Run * (len(runs) + 1))(*runs, Run(self.num_blocks)), device)
        self.first_runs = _to_device(_first_runs(runs, self.num_blocks), device)


def launch_tables(
    layouts: Sequence[StateLayout], is_aligned: bool, device: torch.device, shape: Shape | None = None
) -> list[LaunchTables]:
    """Tables of the launches that update tensors: one for the blocks of each shape, and whether they are aligned.

    Args:
        layouts: Of the tensors, in their order.
        is_aligned: Whether all pointers are multiples of 16 bytes.
        device: Where the tables go.
        shape: Instead of the smallest one for each length.
    """
    sparse: dict[tuple[Shape, bool], list[tuple[int, BlockRun]]] = {}
    for index, layout in enumerate(layouts):
        for run in layout.runs:
            key = shape or Shape.for_blocks(run.numel), is_aligned and _is_aligned(run, layout.config.ef_bits)
            sparse.setdefault(key, []).append((index, run))
    dense = [(index, run) for index, layout in enumerate(layouts) for run in layout.dense_runs]
    classes = list(sparse.items())
    if dense and not classes:
        classes = [((Shape(256), is_aligned), [])]
    # The dense path goes with the first launch.
    return [LaunchTables(layouts, runs, [] if i else dense, *key, device) for i, (key, runs) in enumerate(classes)]


def _is_aligned(run: BlockRun, ef_bits: float) -> bool:
    # Three-level codes are read in groups of eight bytes, others as many at once as a vector has.
    code_bytes = 8 if ef_bits == 1.6 else max(1, VECTOR * int(ef_bits) // 8)
    return run.numel % VECTOR == 0 and run.elements.is_multiple_of(VECTOR) and run.codes.is_multiple_of(code_bytes)


def _first_runs(runs: Sequence[Run], num_blocks: int) -> ctypes.Array[ctypes.c_uint32]:
    """For every ``1 << RUN_SHIFT`` blocks the run that holds the first of them."""
    found, current = [], 0
    for block in range(0, num_blocks, 1 << RUN_SHIFT):
        while current + 1 < len(runs) and runs[current + 1].first_block <= block:
            current += 1
        found.append(current)
    return (ctypes.c_uint32 * len(found))(*found)


def _to_device(table: ctypes.Array[Run] | ctypes.Array[ctypes.c_uint32], device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(table), dtype=torch.uint8).to(device) if len(table) else torch.empty(0)


def kernel_macros(
    tables: LaunchTables, config: MicroAdamConfig, param: torch.dtype, grad: torch.dtype | None
) -> dict[str, str | int]:
    """What is compiled, see ``csrc/cuda/settings.cuh``; without gradients the weights alone are updated."""
    return {
        "PARAM": DTYPES[param],
        "GRAD": DTYPES[grad or param],
        "REPLAY": int(grad is None),
        "ALIGNED": int(tables.is_aligned),
        "THREADS": tables.shape.threads,
        "CHUNKS": tables.shape.chunks,
        "MIN_BLOCKS": tables.shape.min_blocks,
        "WINDOW_SIZE": config.window_size,
        "BUCKET_SIZE": config.bucket_size,
        "LEVELS": num_levels(config.ef_bits),
        "PACKED_WINDOW": int(config.packed_window),
        "STOCHASTIC": int(is_stochastic(config.rounding, param)),
        "LENGTH": tables.length,
        "MAX_KEPT": config.num_kept(tables.longest),
    }


def window_weights(config: MicroAdamConfig, device: torch.device) -> Tensor:
    """b1^r and b2^r by age r, (2, window_size) fp32."""
    scalars = StepScalars.at(config.window_size - 1, config, 1.0)
    return torch.tensor([scalars.m_weights, scalars.v_weights], dtype=torch.float32).to(device)


def step_factors(config: MicroAdamConfig, device: torch.device) -> Tensor:
    """`BiasFactors` by step, (num_steps, 4) fp32; the last row holds on.

    Powers are computed here because those of a GPU have other last bits.
    """
    # From where 1 - beta^t is 1 in float64 nothing changes any more.
    num_steps = max(1 if beta == 0 else math.ceil(-54 * math.log(2) / math.log(beta)) for beta in config.betas)
    rows = [BiasFactors.at(step, config) for step in range(num_steps)]
    return torch.tensor(rows, dtype=torch.float64).float().to(device)


def address_rows(tensors: Sequence[TensorStep], grads: Sequence[Tensor | None]) -> list[tuple[int, ...]]:
    """For each tensor what ``Tensor`` in ``launch.cuh`` holds."""
    addresses = Addresses.of(tensors, grads)
    return list(zip(addresses.param, addresses.grad, *addresses.state, addresses.counter, strict=True))


def signature_of(
    tensors: Sequence[TensorStep], grads: Sequence[Tensor | None], grad_addresses: Sequence[int]
) -> tuple[Any, ...]:
    """What decides about the launches for tensors of some layouts: as long as it is the same, they are.

    Args:
        tensors: The tensors.
        grads: See `readable_grads`.
        grad_addresses: Of these; they may change, but not whether they are multiples of 16.
    """
    params, _, states, layouts, steps, counters = zip(*tensors, strict=True)
    of_state = [state[name] for state, layout in zip(states, layouts, strict=True) for name in layout.tensors]
    return (
        [*map(Tensor.data_ptr, params), *map(Tensor.data_ptr, of_state)],
        [counter.data_ptr() for counter in counters if counter is not None],
        [param.dtype for param in params],
        [None if grad is None else grad.dtype for grad in grads],
        [address & 15 for address in grad_addresses] if functools.reduce(operator.or_, grad_addresses) & 15 else None,
        steps if steps.count(steps[0]) != len(steps) else None,
    )


def are_aligned(rows: Iterable[tuple[int, ...]]) -> list[bool]:
    """For each tensor whether all of its pointers are multiples of 16, but for that of its counter."""
    *columns, _ = zip(*rows, strict=True)
    bits: Iterable[int] = columns[0]
    for column in filter(any, columns[1:]):
        bits = map(operator.or_, bits, column)
    return [b % 16 == 0 for b in bits]


class FilledLaunch:
    """A launch for tensors that stay where they are: what changes from step to step is written into it.

    Args:
        tables: Of the launch.
        rows: See `address_rows`; at most `MAX_TENSORS`.
    """

    def __init__(self, tables: LaunchTables, rows: Sequence[tuple[int, ...]]) -> None:
        self._launch = Launch(num_tensors=len(rows))
        self._tables = tables.runs.data_ptr(), tables.first_runs.data_ptr()
        # All fields from here on have 64 bits; to set them one by one takes several times as long.
        words = memoryview(self._launch).cast("B").cast("q")[Launch.tensors.offset // 8 :]
        row = len(_Tensor._fields_)
        words[: len(rows) * row] = array("q", chain.from_iterable(rows))
        self._grads = words[1 : len(rows) * row : row]

    def fill(
        self,
        scalars: _Scalars,
        weights: Tensor,
        num_skipped: Tensor,
        dense_flags: Tensor | None,
        grads: Sequence[int],
    ) -> Launch:
        """The launch of a step.

        Args:
            scalars: See `host_scalars`.
            weights: See `window_weights`.
            num_skipped: int32; the number of skipped blocks is added to its first element.
            dense_flags: int32, zeros, one for each run of the tables; None where there is no dense run.
            grads: Addresses of the gradients, or 0.
        """
        launch, address = self._launch, weights.data_ptr()
        launch.scalars = scalars  # a copy
        launch.device_scalars = None
        struct.pack_into(
            "6q",
            launch,
            Launch.m_weights.offset,
            address,
            address + weights.nbytes // 2,
            *self._tables,
            num_skipped.data_ptr(),
            0 if dense_flags is None else dense_flags.data_ptr(),
        )
        self._grads[:] = array("q", grads)
        return launch


@functools.lru_cache(maxsize=8)  # an engine that updates parameter by parameter asks for the same ones again and again
def host_scalars(step: int, config: MicroAdamConfig, grad_scale: float) -> _Scalars:
    """The scalars of the update that follows ``step`` finished ones."""
    scalars = StepScalars.at(step, config, grad_scale)
    newest_slot = step % config.window_size
    return _Scalars(*float_values(scalars), len(scalars.m_weights), newest_slot, 0, step_key(config.seed, step))


def device_inputs(inputs: DeviceInputs, config: MicroAdamConfig, factors: Tensor) -> _DeviceInputs:
    """What the scalars of a step are computed from on the device.

    Args:
        inputs: Numbers that lie there.
        config: Gives what does not.
        factors: See `step_factors`.

    Raises:
        ConfigError: The learning rate has another dtype than fp32 or float64.
    """
    lr = {None if inputs.lr is None else inputs.lr.dtype: inputs.lr}
    if not lr.keys() <= {None, torch.float32, torch.float64}:
        raise ConfigError(f"the learning rate is a tensor of {next(iter(lr))}: expected fp32 or float64.")

    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return _DeviceInputs(
        config.lr,
        config.weight_decay,
        pointer(lr.get(torch.float32)),
        pointer(lr.get(torch.float64)),
        pointer(inputs.loss_scale),
        pointer(inputs.found_inf),
        factors.data_ptr(),
        len(factors),
        config.window_size,
        mix(config.seed),
    )


def group_by_kernel(
    tensors: Iterable[TensorStep], grads: Iterable[Tensor | None], aligned: Iterable[bool]
) -> list[list[int]]:
    """Positions of the tensors that go together: of the same dtypes, step and alignment, at most `MAX_TENSORS`."""
    groups: dict[tuple[torch.dtype, torch.dtype | None, int, bool], list[int]] = {}
    for i, (tensor, grad, is_aligned) in enumerate(zip(tensors, grads, aligned, strict=True)):
        key = tensor.param.dtype, None if grad is None else grad.dtype, tensor.step, is_aligned
        groups.setdefault(key, []).append(i)
    return [
        members[first : first + MAX_TENSORS]
        for members in groups.values()
        for first in range(0, len(members), MAX_TENSORS)
    ]
