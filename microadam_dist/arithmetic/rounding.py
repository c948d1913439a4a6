"""Stochastic rounding of bf16 weights: the noise of an element is a function of where it is, and of the step.

To nearest, an update of less than half a bf16 step is lost; rounded up or down by chance, it arrives on average. Part
of the arithmetic contract of `step`. All numbers are unsigned integers of 32 bits, whose sums and products wrap around:

    step_key  = mix(mix(seed) + step)
    key       = mix(step_key ^ shape_key)                     shape_key: of the whole parameter's shape
    counter   = position * POSITION_FACTOR + key              position: of the element in the whole parameter
    noise     = ((counter ^ counter >> 11) * NOISE_FACTOR) >> 16
    bf16(p)   = upper half of (bits(p) + noise)               NaN stays NaN

There is no generator whose state has to be kept: a resumed run goes on with the same noise, and neither engine nor
name nor number of ranks matters. A number that bf16 holds never changes. Any other becomes one of its two neighbours,
the farther one with a chance that is its distance from the nearer one: over all counters every noise comes equally
often. Parameters of the same shape have the same noise. The factors were chosen by ``tests/unit/test_rounding.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_FACTOR = 0xD0ACAD23
NOISE_FACTOR = 0x725D39AD
_MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    """A one-to-one function of 32-bit numbers, all bits of which depend on all bits of ``x``.

    Source: lowbias32, https://github.com/skeeto/hash-prospector.
    """
    x &= _MASK
    x = (x ^ x >> 16) * 0x21F0AAAD & _MASK
    x = (x ^ x >> 15) * 0x735A2D97 & _MASK
    return x ^ x >> 15


def step_key(seed: int, step: int) -> int:
    """What seed and ``step`` finished steps bring into the noise."""
    return mix(mix(seed) + step)


def shape_key(global_shape: Sequence[int]) -> int:
    """What the shape of a whole parameter brings into the noise."""
    key = len(global_shape)
    for size in global_shape:
        key = mix(key + size)
    return key


def is_stochastic(rounding: str, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype, the ones that are stepped, are rounded stochastically; see `MicroAdamConfig`."""
    return rounding != "nearest" and dtype == torch.bfloat16


# Of int32 tensors: products and sums wrap around as those of unsigned numbers do, but the sign is copied by a shift.


def counters(positions: Tensor, step_key: int, shape_key: int) -> Tensor:
    """The counters of some elements of one parameter, int32.

    Args:
        positions: In the whole parameter, int64.
        step_key: See `step_key`.
        shape_key: See `shape_key`.
    """
    return positions.int() * _signed(POSITION_FACTOR) + _signed(mix(step_key ^ shape_key))


def counters_from(first: Tensor, numel: int) -> Tensor:
    """The counters of ``numel`` elements in a row, from that of the first: (..., 1) -> (..., numel)."""
    return first + torch.arange(numel, dtype=torch.int32, device=first.device) * _signed(POSITION_FACTOR)


def noise_of(counters: Tensor) -> Tensor:
    """0 to 0xFFFF, int32."""
    return (counters ^ (counters >> 11 & 0x1FFFFF)) * _signed(NOISE_FACTOR) >> 16 & 0xFFFF


def round_weights(x: Tensor, dtype: torch.dtype, counters: Tensor | None) -> Tensor:
    """Round fp32 numbers to the dtype of weights: to nearest, or where they have counters stochastically to bf16."""
    if counters is None:
        return x.to(dtype)
    upper = ((x.view(torch.int32) + noise_of(counters)) >> 16).short().view(torch.bfloat16)
    return torch.where(x.isnan(), x.bfloat16(), upper)  # the sum of a NaN and noise may wrap around


def _signed(x: int) -> int:
    return x - (x >> 31 << 32)
