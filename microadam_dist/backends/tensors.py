"""What backends do with the tensors of a step: the gradients they can read, their addresses, counters."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from .base import TensorStep

STATE_NAMES = ("codes", "bucket_lo", "bucket_hi", "indices", "values", "scales", "exp_avg", "exp_avg_sq")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def count_steps(tensors: Iterable[TensorStep]) -> None:
    """Add 1 to the counters of tensors that have been stepped."""
    counters = [tensor.counter for tensor in tensors if tensor.counter is not None]
    if all(counter.is_cpu for counter in counters):
        for counter in counters:  # through pointers, because torch takes twice as long, for one alone four times
            ctypes.c_int64.from_address(counter.data_ptr()).value += 1
    else:
        torch._foreach_add_(counters, 1)


def readable_grads(tensors: Iterable[TensorStep]) -> list[Tensor | None]:
    """The gradients in a dtype that the fused kernels read."""
    grads = [tensor.grad for tensor in tensors]
    return [grad if grad is None or grad.dtype in _KERNEL_DTYPES else grad.float() for grad in grads]


def addresses(tensor: TensorStep, grad: Tensor | None) -> list[int]:
    """Where the param, the gradient and each of `STATE_NAMES` lie; 0 for what there is not."""
    present = (tensor.param, grad, *map(tensor.state.get, STATE_NAMES))
    return [0 if x is None else x.data_ptr() for x in present]
