"""What backends do with the tensors of a step: the gradients they can read, tables of addresses, counters."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import DENSE_TENSORS, ERROR_TENSORS, WINDOW_TENSORS
from .base import TensorStep

STATE_NAMES = (*ERROR_TENSORS, *WINDOW_TENSORS, *DENSE_TENSORS)

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def count_steps(tensors: Iterable[TensorStep]) -> None:
    """Add 1 to the counters of tensors that have been stepped."""
    on_device = []
    for tensor in tensors:
        if (counter := tensor.counter) is None:
            continue
        if counter.is_cpu:  # through a pointer, because torch takes twice as long, for one alone four times
            ctypes.c_int64.from_address(counter.data_ptr()).value += 1
        else:
            on_device.append(counter)
    if on_device:
        torch._foreach_add_(on_device, 1)


def readable_grads(tensors: Iterable[TensorStep]) -> list[Tensor | None]:
    """The gradients in a dtype that the fused kernels read."""
    return [
        grad if (grad := tensor.grad) is None or grad.dtype in _KERNEL_DTYPES else grad.float() for tensor in tensors
    ]


class Addresses(NamedTuple):
    """Addresses of tensors, a list for each field with one entry per `TensorStep`; 0 for what it does not have.

    Field by field, because a Python call per tensor takes longer than the step of a small one.

    Attributes:
        param, grad, counter: As in `TensorStep`; ``grad`` as it was given.
        state: One list for each of `STATE_NAMES`.
    """

    param: list[int]
    grad: list[int]
    counter: list[int]
    state: list[list[int]]

    @classmethod
    def of(cls, tensors: Sequence[TensorStep], grads: Sequence[Tensor | None]) -> Addresses:
        """Of tensors and their gradients."""
        params, _, states, _, _, counters = zip(*tensors, strict=True)
        present, nothing = set().union(*states), [0] * len(tensors)
        return cls(
            param=[param.data_ptr() for param in params],
            grad=addresses_of(grads),
            counter=addresses_of(counters),
            state=[
                [state[name].data_ptr() if name in state else 0 for state in states] if name in present else nothing
                for name in STATE_NAMES
            ],
        )


def addresses_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Their addresses; 0 where there is none."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def pack_rows(fields: Sequence[Sequence[int]]) -> bytes:
    """A table of 64-bit integers, row by row, from its fields."""
    return struct.pack(f"{sum(map(len, fields))}q", *chain.from_iterable(zip(*fields, strict=True)))
