"""The window as it is stored: slots of 16-bit indices and bf16 values, or packed.

Packed (ours): 12-bit indices, which lose nothing, and 8-bit values with a scale for each slot of a block. What they
leave of a value stays in the error feedback. Part of the arithmetic contract of `step`. Shapes: B blocks, k kept
in each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_CODE = 127


class Slot(NamedTuple):
    """One slot of B blocks.

    Attributes:
        indices: (B, index_bytes) uint8: 16-bit numbers, or 12-bit ones, two in three bytes, the first in the lower
            bits.
        values: (B, k) bf16, or the bits of int8 as uint8.
        scales: (B, 1) bf16, or None where values are bf16.
    """

    indices: Tensor
    values: Tensor
    scales: Tensor | None


class Window(NamedTuple):
    """All slots of some blocks: the tensors of `Slot`, (..., window_size, x) each; writing to them writes the state."""

    indices: Tensor
    values: Tensor
    scales: Tensor | None

    def slot(self, number: int) -> Slot:
        """One slot of all blocks, in a row."""
        return Slot(*(None if part is None else part[..., number, :].flatten(0, -2) for part in self))  # type: ignore[arg-type]

    def store_(self, number: int, slot: Slot) -> None:
        """In place: one slot of all blocks."""
        for stored, new in zip(self, slot, strict=True):
            if stored is not None and new is not None:
                stored[..., number, :] = new.view(*stored.shape[:-2], -1)


def encode_slot(indices: Tensor, values: Tensor, packed: bool) -> Slot:
    """Store (B, k) int64 indices and (B, k) values.

    Values that are packed: ``scale = bf16(max|v| / 127)``, ``codes = clip(rint(v * (1 / scale)), -127, 127)``; 0 where
    the scale is so small that ``1 / scale`` overflows.
    """
    if not packed:
        return Slot(indices.short().view(torch.uint8), values.bfloat16(), None)
    values = values.float()
    largest = values.abs().amax(dim=1, keepdim=True)
    # Division by a tensor: dividing by a Python number may be computed as a product with the reciprocal.
    scales = (largest / torch.full_like(largest, MAX_CODE)).bfloat16()
    inverse = torch.ones_like(largest) / scales.float()
    inverse = torch.where(inverse.isfinite(), inverse, 0.0)
    codes = (values * inverse).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
    return Slot(pack_indices(indices), codes.view(torch.uint8), scales)


def decode_slot(slot: Slot) -> tuple[Tensor, Tensor]:
    """(B, k) int64 indices and (B, k) fp32 values, ``codes * scale`` where they are packed."""
    indices = decode_indices(slot.indices, slot.values.shape[1], packed=slot.scales is not None)
    if slot.scales is None:
        return indices, slot.values.float()
    return indices, slot.values.view(torch.int8).float() * slot.scales.float()


def decode_indices(stored: Tensor, num_kept: int, packed: bool) -> Tensor:
    """(B, index_bytes) uint8 -> (B, num_kept) int64."""
    return unpack_indices(stored, num_kept) if packed else stored.view(torch.int16).long()


def pack_indices(indices: Tensor) -> Tensor:
    """(B, k) integers below 4096 -> (B, ceil(1.5 k)) uint8."""
    first, second = indices[:, ::2], torch.nn.functional.pad(indices[:, 1::2], (0, indices.shape[1] % 2))
    triples = torch.stack([first & 255, first >> 8 | (second & 15) << 4, second >> 4], dim=2)
    return triples.flatten(1)[:, : -(-3 * indices.shape[1] // 2)].byte()


def unpack_indices(packed: Tensor, num_kept: int) -> Tensor:
    """Inverse of `pack_indices`, int64."""
    triples = torch.nn.functional.pad(packed, (0, num_kept % 2)).view(len(packed), -1, 3).long()
    low, middle, high = triples.unbind(2)
    pairs = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=2)
    return pairs.flatten(1)[:, :num_kept]
