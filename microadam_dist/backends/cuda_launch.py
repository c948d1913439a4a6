"""What one launch of the CUDA kernel is given: ctypes mirrors of ``csrc/cuda/launch.cuh``, and how they are filled."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import struct
from collections.abc import Iterable, Sequence
from ctypes import Structure, c_double, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..arithmetic.rounding import is_stochastic, mix, step_key
from ..arithmetic.scalars import BiasFactors, StepScalars
from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..layout import BlockRun, StateLayout
from .base import DeviceInputs, TensorStep
from .structures import EXTENT_FIELDS, FloatScalars, Place, extents_of, float_values, place_of
from .tensors import STATE_NAMES, Addresses

MAX_TENSORS = 256  # so that a launch's parameters stay below 32 KiB
RUN_SHIFT = 6  # runs are found by block number >> RUN_SHIFT
VECTOR = 8  # elements a thread reads and writes at once
DTYPES = {torch.float32: "Fp32", torch.bfloat16: "Bf16", torch.float16: "Fp16"}


class Run(Structure):
    """Top-K blocks of one length, or an interval on the dense path."""

    _fields_ = [
        *((name, c_int64) for name in ("first_block", "tensor", "numel", "num_kept", "cols", "is_aligned")),
        ("place", Place),
        *EXTENT_FIELDS,
    ]


class _Tensor(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("param", "grad", *STATE_NAMES, "step")),
        ("is_aligned", c_int64),
    ]


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
    chunks: int

    @property
    def capacity(self) -> int:
        """Elements of the longest Top-K block."""
        return self.threads * self.chunks * VECTOR

    @property
    def min_blocks(self) -> int:
        """Thread blocks that shall fit a multiprocessor at once: 1024 threads, fewer where they need more registers."""
        return min(16, max(1, 1024 // (self.threads * max(1, self.chunks // 2))))

    @classmethod
    def for_blocks(cls, longest: int) -> Shape:
        """The smallest shape that holds blocks of up to ``longest`` elements."""
        return next(shape for shape in SHAPES if longest <= shape.capacity)


# 512 threads can have 128 registers each, which hold the longest block without spilling.
SHAPES = tuple(Shape(*pair) for pair in ((32, 1), (64, 1), (128, 1), (256, 1), (256, 2), (512, 2), (512, 4), (512, 8)))


class LaunchTables:
    """What is the same in every launch for tensors of the same layouts.

    Args:
        layouts: Of the tensors of a launch, in their order.
        device: Where the tables go.
        shape: Instead of the one chosen for the longest block.

    Attributes:
        longest: Elements of the longest Top-K block; 1 if there is none.
        shape: Of the thread blocks.
        num_blocks: Thread blocks of a launch.
        num_runs: Runs of Top-K blocks and of the dense path.
        runs, first_runs: Tables on the device, as uint8; see ``launch.cuh``.
    """

    def __init__(self, layouts: Sequence[StateLayout], device: torch.device, shape: Shape | None = None) -> None:
        self.longest = max((run.numel for layout in layouts for run in layout.runs), default=1)
        self.shape = shape or Shape.for_blocks(self.longest)
        runs: list[Run] = []
        self.num_blocks = 0
        for index, layout in enumerate(layouts):
            for run in layout.runs:
                runs.append(_sparse_run(run, index, self.num_blocks, place_of(layout.spans[run.span_index])))
                self.num_blocks += run.num_blocks
            for dense in layout.dense_runs:
                dense_run = Run(self.num_blocks, index, dense.numel, place=place_of(layout.spans[dense.span_index]))
                dense_run.elements.start, dense_run.values.start = dense.start, dense.state_start
                runs.append(dense_run)
                self.num_blocks += -(-dense.numel // self.shape.capacity)
        self.num_runs = len(runs)
        self.runs = _to_device((Run * (len(runs) + 1))(*runs, Run(self.num_blocks)), device)
        self.first_runs = _to_device(_first_runs(runs, self.num_blocks), device)


def _sparse_run(run: BlockRun, tensor: int, first_block: int, place: Place) -> Run:
    is_aligned = run.elements.is_multiple_of(VECTOR) and run.codes.is_multiple_of(VECTOR // 2)
    cols = 0 if run.is_gapless else run.cols
    return Run(first_block, tensor, run.numel, run.num_kept, cols, is_aligned, place, *extents_of(run))


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
        "THREADS": tables.shape.threads,
        "CHUNKS": tables.shape.chunks,
        "MIN_BLOCKS": tables.shape.min_blocks,
        "WINDOW_SIZE": config.window_size,
        "BUCKET_SIZE": config.bucket_size,
        "PACKED_WINDOW": int(config.packed_window),
        "STOCHASTIC": int(is_stochastic(config.rounding, param)),
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


def fill_launch(
    tables: LaunchTables,
    tensors: Sequence[TensorStep],
    grads: Sequence[Tensor | None],
    weights: Tensor,
    num_skipped: Tensor,
    dense_flags: Tensor | None,
) -> Launch:
    """Everything but the scalars.

    Args:
        tables: Of the layouts of ``tensors``.
        tensors: At most `MAX_TENSORS`.
        grads: Their gradients, fp32, bf16 or fp16; None for all of them where only the weights are updated.
        weights: See `window_weights`.
        num_skipped: int32; the number of skipped blocks is added to its first element.
        dense_flags: int32, zeros, one for each run of the tables; None where there is no dense run.
    """
    weights_address = weights.data_ptr()
    head = (
        weights_address,
        weights_address + weights.nbytes // 2,
        tables.runs.data_ptr(),
        tables.first_runs.data_ptr(),
        num_skipped.data_ptr(),
        0 if dense_flags is None else dense_flags.data_ptr(),
        len(tensors),
    )
    addresses = Addresses.of(tensors, grads)
    accessed = [addresses.param, addresses.grad, *addresses.state]
    bits: Iterable[int] = accessed[0]
    for column in filter(any, accessed[1:]):
        bits = map(operator.or_, bits, column)
    rows = zip(*accessed, addresses.counter, [b % 16 == 0 for b in bits], strict=True)
    # All fields from here on have 64 bits; to set them one by one takes several times as long.
    num_values = len(head) + len(tensors) * len(_Tensor._fields_)
    launch = Launch()
    struct.pack_into(f"{num_values}q", launch, Launch.m_weights.offset, *head, *chain.from_iterable(rows))
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


def group_by_kernel(tensors: Iterable[TensorStep], grads: Iterable[Tensor | None]) -> list[list[int]]:
    """Positions of the tensors that one launch can update: of the same dtypes and step, at most `MAX_TENSORS`."""
    groups: dict[tuple[torch.dtype, torch.dtype | None, int], list[int]] = {}
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        groups.setdefault((tensor.param.dtype, None if grad is None else grad.dtype, tensor.step), []).append(i)
    return [
        members[first : first + MAX_TENSORS]
        for members in groups.values()
        for first in range(0, len(members), MAX_TENSORS)
    ]
