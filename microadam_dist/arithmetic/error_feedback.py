"""The quantized error feedback: codes of 2, 4 or 8 bits between the smallest and the largest element of each bucket.

Source: MicroAdam, arXiv:2405.15593, Algorithm 2. Shapes: B blocks of n elements in q buckets of ``bucket_size``
elements, the last of which may be shorter. Part of the arithmetic contract of `step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StoredError(NamedTuple):
    """What is left of the accumulators of some blocks, quantized.

    Attributes:
        codes: (..., code_bytes) uint8.
        lo, hi: (..., q) bf16, the range of each bucket.
    """

    codes: Tensor
    lo: Tensor
    hi: Tensor


def decode_error(stored: StoredError, numel: int, *, bits: int, bucket_size: int) -> Tensor:
    """The stored error: ``codes * step_q + lo`` with ``step_q = (hi - lo) / levels``.

    Args:
        stored: Of B blocks, (B, x) each.
        numel: n.
        bits, bucket_size: Bits of a code, elements of a bucket.

    Returns:
        (B, n) fp32.
    """
    codes = unpack_codes(stored.codes, bits)[:, :numel].float()
    lo, hi = stored.lo.float(), stored.hi.float()
    # Division by a tensor: dividing by a Python number may be computed as a product with the reciprocal.
    width = hi - lo
    step_q = width / torch.full_like(width, 2**bits - 1)
    return codes * spread(step_q, bucket_size, numel) + spread(lo, bucket_size, numel)


def encode_error(residual: Tensor, *, bits: int, bucket_size: int) -> StoredError:
    """Quantize: ``lo, hi = bf16(min), bf16(max)`` per bucket, ``codes = clip(rint((a - lo) * (levels / (hi - lo))))``.

    The codes of a bucket are 0 where ``hi == lo`` or the range is so small that ``levels / (hi - lo)`` overflows.

    Args:
        residual: (B, n) fp32.
        bits, bucket_size: Bits of a code, elements of a bucket.
    """
    levels, numel = 2**bits - 1, residual.shape[1]
    # A shorter last bucket is filled up with its last element, which changes neither minimum nor maximum.
    filling = residual[:, -1:].expand(-1, -numel % bucket_size)
    buckets = torch.cat([residual, filling], dim=1).view(residual.shape[0], -1, bucket_size)
    bucket_lo, bucket_hi = buckets.amin(dim=2).bfloat16(), buckets.amax(dim=2).bfloat16()
    lo, width = bucket_lo.float(), bucket_hi.float() - bucket_lo.float()
    inverse = torch.full_like(width, levels) / width
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    scaled = (residual - spread(lo, bucket_size, numel)) * spread(inverse, bucket_size, numel)
    return StoredError(pack_codes(scaled.round().clamp(0, levels).byte(), bits), bucket_lo, bucket_hi)


def spread(per_bucket: Tensor, bucket_size: int, numel: int) -> Tensor:
    """(B, q) -> (B, n): the bucket's number for each of its elements."""
    return per_bucket.repeat_interleave(bucket_size, dim=1)[:, :numel]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(B, n) codes below 2**bits -> (B, ceil(n * bits / 8)) uint8; the first code is in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(codes.shape[0], -1, per_byte)
    packed = torch.zeros_like(padded[:, :, 0])
    for i in range(per_byte):
        packed |= padded[:, :, i] << (bits * i)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`; the length is rounded up to whole bytes."""
    mask = 2**bits - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)
