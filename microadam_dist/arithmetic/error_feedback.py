"""The quantized error feedback: codes of 1 to 8 bits, with one range or one scale for the elements of a bucket.

A code stands for ``code * step + lo``. With 4 and 8 bits the numbers are spread over the bucket, as in the paper:

    lo, hi = bf16(min a), bf16(max a)                             stored;  step = (hi - lo) / levels

Below 4 bits that wastes levels, and most of what is left of an accumulator is near or at zero (all kept elements, rows
that no token has seen). There (ours) the bucket stores one number, from its largest magnitude, and a zero stays zero:

    2 bits      scale = hi / 2, or lo / 2 if |lo| > |hi|           numbers -scale, 0, scale, 2 scale
    1.6 bits    scale = bf16(5/8 max(|lo|, |hi|))                  numbers -scale, 0, scale; five codes in a byte
    1 bit       scale = bf16(3/8 max(|lo|, |hi|))                  numbers -scale, scale

One bit has no zero: the sign that a zero gets changes from step to step and from element to element, because one that
is always the same adds up.

Source: MicroAdam, arXiv:2405.15593, Algorithm 2, for 4 and 8 bits. Shapes: B blocks of n elements in q buckets of
``bucket_size`` elements, the last of which may be shorter. Part of the arithmetic contract of `step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import CODES_PER_BYTE, ERROR_TENSORS, MAX_SCALED_BITS, num_levels, ternary_groups

# Of a bucket's largest magnitude; near the ones with the smallest error, and exact in fp32 for a bf16 number.
_SCALE_FACTORS = {1: 3 / 8, 1.6: 5 / 8, 2: 1 / 2}


class StoredError(NamedTuple):
    """What is left of the accumulators of some blocks, quantized.

    Attributes:
        codes: (..., code_bytes) uint8.
        lo, hi: (..., q) bf16, the range of each bucket; None below 4 bits.
        scale: (..., q) bf16; None with 4 bits and more.
    """

    codes: Tensor
    lo: Tensor | None
    hi: Tensor | None
    scale: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StoredError:
        """From state tensors by name."""
        return cls(tensors["codes"], *(tensors.get(name) for name in ERROR_TENSORS[1:]))


def decode_error(stored: StoredError, numel: int, *, bits: float, bucket_size: int) -> Tensor:
    """The stored error, ``code * step + lo``.

    Args:
        stored: Of B blocks, (B, x) each.
        numel: n.
        bits, bucket_size: Bits of a code, elements of a bucket.

    Returns:
        (B, n) fp32.
    """
    lo, step = _lo_and_step(stored, bits)
    codes = unpack_codes(stored.codes, numel, bits).float()
    return codes * spread(step, bucket_size, numel) + spread(lo, bucket_size, numel)


def _lo_and_step(stored: StoredError, bits: float) -> tuple[Tensor, Tensor]:
    if stored.scale is not None:
        scale = stored.scale.float()
        return -scale, 2 * scale if bits == 1 else scale
    assert stored.lo is not None and stored.hi is not None
    lo, hi = stored.lo.float(), stored.hi.float()
    # Division by a tensor: dividing by a Python number may be computed as a product with the reciprocal.
    width = hi - lo
    return lo, width / torch.full_like(width, num_levels(bits))


def encode_error(residual: Tensor, *, bits: float, bucket_size: int, zero_key: int = 0) -> StoredError:
    """Quantize to the nearest: ``codes = clip(rint((a - lo) * (1 / step)))`` with ``1 / step`` rounded once.

    The codes of a bucket are 0 where its range is so small that ``levels / (hi - lo)`` overflows, or none; a scale so
    small that ``1 / scale`` overflows is stored as 0.

    Args:
        residual: (B, n) fp32.
        bits, bucket_size: Bits of a code, elements of a bucket.
        zero_key: With 1 bit, zeros at places of the block where ``place + zero_key`` is odd become positive.
    """
    levels, numel = num_levels(bits), residual.shape[1]
    # A shorter last bucket is filled up with its last element, which changes neither minimum nor maximum.
    filling = residual[:, -1:].expand(-1, -numel % bucket_size)
    buckets = torch.cat([residual, filling], dim=1).view(residual.shape[0], -1, bucket_size)
    lo, hi = buckets.amin(dim=2).bfloat16(), buckets.amax(dim=2).bfloat16()
    least, width = lo.float(), hi.float() - lo.float()
    inverse, scale = _finite(torch.full_like(width, levels) / width), None
    if bits <= MAX_SCALED_BITS:
        scale, inverse = _scale(lo.float(), hi.float(), bits)
        least = -scale.float()
    if bits == 1:
        is_odd = (torch.arange(numel, device=residual.device) + zero_key) % 2 == 1
        codes = ((residual > 0) | (residual == 0) & is_odd).byte()
    else:
        scaled = (residual - spread(least, bucket_size, numel)) * spread(inverse, bucket_size, numel)
        codes = scaled.round().clamp(0, levels).byte()
    packed = pack_codes(codes, bits)
    return StoredError(packed, lo, hi, None) if scale is None else StoredError(packed, None, None, scale)


def _scale(lo: Tensor, hi: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Of every bucket, bf16, and its inverse."""
    extreme = torch.where(hi.abs() < lo.abs(), lo, hi)
    if bits < 2:
        extreme = extreme.abs()
    scale = (extreme * _SCALE_FACTORS[bits]).bfloat16()
    inverse = _finite(torch.ones_like(extreme) / scale.float())
    return torch.where(inverse != 0, scale, 0.0), inverse


def _finite(inverse: Tensor) -> Tensor:
    return torch.where(inverse.isfinite(), inverse, 0.0)


def spread(per_bucket: Tensor, bucket_size: int, numel: int) -> Tensor:
    """(B, q) -> (B, n): the bucket's number for each of its elements."""
    return per_bucket.repeat_interleave(bucket_size, dim=1)[:, :numel]


def pack_codes(codes: Tensor, bits: float) -> Tensor:
    """(B, n) codes -> (B, code_bytes) uint8; the first code is in the lowest bits. 1.6 bits: see `ternary_groups`."""
    if bits == 1.6:
        return _pack_ternary(codes)
    per_byte = 8 // int(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(codes.shape[0], -1, per_byte)
    packed = torch.zeros_like(padded[:, :, 0])
    for i in range(per_byte):
        packed |= padded[:, :, i] << (int(bits) * i)
    return packed


def unpack_codes(packed: Tensor, numel: int, bits: float) -> Tensor:
    """Inverse of `pack_codes`."""
    if bits == 1.6:
        return _unpack_ternary(packed, numel)
    mask = 2 ** int(bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, int(bits))], dim=2).flatten(1)[:, :numel]


def _pack_ternary(codes: Tensor) -> Tensor:
    """A byte is ``c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4``."""
    powers = 3 ** torch.arange(CODES_PER_BYTE, dtype=torch.uint8, device=codes.device).view(-1, 1)
    packed = []
    for group in ternary_groups(codes.shape[1]):
        members = codes[:, group.start : group.start + group.numel]
        padded = torch.nn.functional.pad(members, (0, CODES_PER_BYTE * group.width - group.numel))
        digits = padded.view(-1, CODES_PER_BYTE, group.width)
        packed.append((digits * powers).sum(dim=1, dtype=torch.uint8))
    return torch.cat(packed, dim=1)


def _unpack_ternary(packed: Tensor, numel: int) -> Tensor:
    codes = []
    for group in ternary_groups(numel):
        rest = packed[:, group.first_byte : group.first_byte + group.width]
        digits = []
        for _ in range(CODES_PER_BYTE):
            digits.append(rest % 3)
            rest = rest // 3
        codes.append(torch.cat(digits, dim=1)[:, : group.numel])
    return torch.cat(codes, dim=1)
