"""MicroAdam once more, one number at a time in NumPy: slow, and sharing nothing with the package but the paper.

Written from the algorithm's description. Blocks are found by walking over the elements, codes are kept unpacked, the
window is a list of dictionaries, moments are summed one coordinate at a time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

F32 = np.float32


def to_bf16(x: np.float32) -> np.float32:
    """Round to the nearest bf16, ties to even."""
    if np.isnan(x):
        return x
    bits = int(np.array(x, F32).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return F32(np.array(bits, np.uint32).view(F32))


def scramble(x: int) -> int:
    """A hash of 32 bits."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x


@functools.cache
def noise_key(shape: tuple[int, ...], seed: int, step: int) -> int:
    of_shape = len(shape)
    for size in shape:
        of_shape = scramble((of_shape + size) % 2**32)
    return scramble(scramble((scramble(seed) + step) % 2**32) ^ of_shape)


def noise_at(position: int, shape: tuple[int, ...], seed: int, step: int) -> int:
    """16 bits for an element of a parameter."""
    counter = (position * 3500977443 + noise_key(shape, seed, step)) % 2**32
    return (counter ^ (counter // 2**11)) * 1918712237 % 2**32 // 2**16


def to_bf16_by_chance(x: np.float32, noise: int) -> np.float32:
    """One of the two bf16 numbers around x: the one farther from zero for as much of the noise as x is near to it."""
    if np.isnan(x):
        return x
    bits = int(np.array(x, F32).view(np.uint32))
    nearer, rest = bits - bits % 2**16, bits % 2**16
    return F32(np.array(nearer + 2**16 * (rest + noise >= 2**16), np.uint32).view(F32))


def to_dtype(x: np.float32, dtype: str) -> np.float32:
    if dtype == "bfloat16":
        return to_bf16(x)
    return F32(np.float16(x)) if dtype == "float16" else F32(x)


def top_k(a: list[np.float32], k: int) -> list[int] | None:
    """The places of the k largest magnitudes after rounding to bf16, ascending; None: one of them is not finite."""
    keys = [abs(to_bf16(x)) for x in a]
    if not all(key < 2.0**60 for key in keys):
        return None
    return sorted(sorted(range(len(a)), key=lambda i: (-float(keys[i]), i))[:k])


@dataclass
class Bucket:
    """Error-feedback codes of some elements, and what they stand for: ``code * step + lo``."""

    codes: list[int]
    stored: dict[str, np.float32]  # by the name of the state tensor
    lo: np.float32 = F32(0)
    step: np.float32 = F32(0)


def encode(a: list[np.float32], bits: float, first: int, noise: int) -> Bucket:
    """Quantize the elements of one bucket; ``first`` is the place of the first one in its block."""
    low, high = to_bf16(min(a)), to_bf16(max(a))
    if bits >= 4:
        top = 2**bits - 1
        inverse = F32(top) / F32(high - low)
        codes = [np.rint(F32(x - low) * inverse) if np.isfinite(inverse) else 0 for x in a]
        stored = {"bucket_lo": low, "bucket_hi": high}
        lo, step = low, F32(high - low) / F32(top)
    else:
        top = {1: 1, 1.6: 2, 2: 3}[bits]
        largest = max(abs(low), abs(high))
        scale = to_bf16({1: F32(0.375), 1.6: F32(0.625), 2: F32(0.5)}[bits] * largest)
        if bits == 2 and -low > high:
            scale = -scale
        inverse = F32(1) / scale
        if not np.isfinite(inverse):
            scale = inverse = F32(0)
        if bits == 1:
            codes = [int(x > 0) if x else (first + i + noise) % 2 for i, x in enumerate(a)]
        else:
            codes = [np.rint(F32(x + scale) * inverse) for x in a]
        stored = {"bucket_scale": scale}
        lo, step = -scale, 2 * scale if bits == 1 else scale
    return Bucket([int(min(max(code, 0), top)) for code in codes], stored, lo, step)


@dataclass
class Block:
    """One Top-K block: the places of its elements in the local tensor, its error and its window."""

    places: list[int]
    buckets: list[Bucket] = field(default_factory=list)
    slots: dict[int, list[tuple[int, np.float32]]] = field(default_factory=dict)
    codes_of: dict[int, list[int]] = field(default_factory=dict)  # of a packed window: the values in 8 bits ...
    scale_of: dict[int, np.float32] = field(default_factory=dict)  # ... and what to multiply them with


class ScalarMicroAdam:
    """One local tensor that holds spans ``(global_shape, start, numel, offset)``."""

    def __init__(self, spans: list[tuple[tuple[int, ...], int, int, int]], settings: Any, dtype: str) -> None:
        self.s, self.dtype = settings, dtype
        self.blocks: list[Block] = []
        self.is_stochastic = settings.rounding in ("auto", "stochastic") and dtype == "bfloat16"
        self.origin: dict[int, tuple[tuple[int, ...], int]] = {}  # place -> shape of the parameter, position in it
        self.dense: list[list[int]] = []
        for shape, start, numel, offset in spans:
            self.origin |= {offset + i: (shape, start + i) for i in range(numel)}
            if len(shape) < 2 or math.prod(shape) < 4096 or math.prod(shape) // shape[0] < 64:
                self.dense.append(list(range(offset, offset + numel)))
                continue
            length = self._block_length(math.prod(shape) // shape[0])
            row_numel = math.prod(shape) // shape[0]
            previous = None
            for i in range(numel):
                row, column = divmod(start + i, row_numel)
                block_id = (row, column // length)
                if block_id != previous:
                    self.blocks.append(Block([]))
                    previous = block_id
                self.blocks[-1].places.append(offset + i)
        for block in self.blocks:
            names = ["bucket_lo", "bucket_hi"] if self.s.ef_bits >= 4 else ["bucket_scale"]
            for first in range(0, len(block.places), self.s.bucket_size):
                length = min(self.s.bucket_size, len(block.places) - first)
                block.buckets.append(Bucket([0] * length, dict.fromkeys(names, F32(0))))
        self.m = {place: F32(0) for span in self.dense for place in span}
        self.v = dict(self.m)

    def _block_length(self, row: int) -> int:
        fewest = math.ceil(row / self.s.block_size)
        for n in range(fewest, 4 * fewest + 1):
            if row % (8 * n) == 0:
                return row // n
        return min(row, 8 * math.ceil(Fraction(row, 8 * fewest)))

    def step(self, param: np.ndarray, grad: np.ndarray, step: int, grad_scale: float) -> int:
        """Update ``param`` (fp32 numbers that fit the dtype) in place; ``grad`` is fp32. Returns skipped blocks."""
        with np.errstate(all="ignore"):
            skipped = sum(self._step_block(block, param, grad, step, F32(grad_scale)) for block in self.blocks)
            return skipped + sum(self._step_dense(places, param, grad, step, F32(grad_scale)) for places in self.dense)

    def _step_block(self, block: Block, param: np.ndarray, grad: np.ndarray, step: int, grad_scale: np.float32) -> int:
        s, n = self.s, len(block.places)
        k = math.ceil(Fraction(str(s.density)) * n)
        slot = step % s.window_size

        a = []
        for i, place in enumerate(block.places):
            value = F32(grad[place]) * grad_scale
            if s.ef_bits:
                bucket = block.buckets[i // s.bucket_size]
                value = value + (F32(bucket.codes[i % s.bucket_size]) * bucket.step + bucket.lo)
            a.append(F32(value))

        kept = top_k(a, k)
        if kept is None:
            block.slots[slot] = [(i, F32(0)) for i in range(k)]
            block.codes_of[slot], block.scale_of[slot] = [0] * k, F32(0)
            return 1
        block.slots[slot] = [(i, to_bf16(a[i])) for i in kept]
        if s.packed_window:
            self._pack(block, slot)
        for i, value in block.slots[slot]:
            a[i] = F32(a[i] - value) if s.packed_window else F32(0)
        if s.ef_bits:
            noise = scramble((scramble(s.seed) + step) % 2**32)
            firsts = range(0, n, s.bucket_size)
            block.buckets = [encode(a[first : first + s.bucket_size], s.ef_bits, first, noise) for first in firsts]

        count = min(step + 1, s.window_size) if s.correction == "window" else step + 1
        c1, c2 = (F32((1 - beta) / (1 - beta**count)) for beta in s.betas)
        moments: dict[int, tuple[np.float32, np.float32]] = {}
        for age in range(min(step + 1, s.window_size) - 1, -1, -1):
            w1, w2 = F32(s.betas[0] ** age), F32(s.betas[1] ** age)
            for i, value in block.slots[(step - age) % s.window_size]:
                m, v = moments.get(i, (F32(0), F32(0)))
                moments[i] = (m + w1 * value, v + w2 * (value * value))
        for i, place in enumerate(block.places):
            p = F32(param[place]) * F32(1 - s.lr * s.weight_decay)
            if i in moments:
                m, v = moments[i]
                p = p - F32(s.lr) * ((c1 * m) / (F32(s.eps) + np.sqrt(c2 * v)))
            param[place] = self._round(p, place, step)
        return 0

    def _round(self, p: np.float32, place: int, step: int) -> np.float32:
        if not self.is_stochastic:
            return to_dtype(p, self.dtype)
        shape, position = self.origin[place]
        return to_bf16_by_chance(p, noise_at(position, shape, self.s.seed, step))

    @staticmethod
    def _pack(block: Block, slot: int) -> None:
        places, values = zip(*block.slots[slot], strict=True)
        scale = to_bf16(F32(max(abs(value) for value in values)) / F32(127))
        inverse = F32(1) / scale
        codes = [int(np.rint(value * inverse)) if np.isfinite(inverse) else 0 for value in values]
        block.codes_of[slot] = [min(max(code, -127), 127) for code in codes]
        block.scale_of[slot] = scale
        block.slots[slot] = [(i, F32(code) * scale) for i, code in zip(places, block.codes_of[slot], strict=True)]

    def _step_dense(
        self, places: list[int], param: np.ndarray, grad: np.ndarray, step: int, grad_scale: np.float32
    ) -> int:
        s, t, skipped = self.s, step + 1, 0
        for place in places:
            g = F32(grad[place]) * grad_scale
            if not abs(to_bf16(g)) < 2.0**60:
                skipped = 1
                continue
            self.m[place] = m = self.m[place] * F32(s.betas[0]) + g * F32(1 - s.betas[0])
            self.v[place] = v = self.v[place] * F32(s.betas[1]) + (g * g) * F32(1 - s.betas[1])
            m_hat, v_hat = m * F32(1 / (1 - s.betas[0] ** t)), v * F32(1 / (1 - s.betas[1] ** t))
            p = F32(param[place]) * F32(1 - s.lr * s.weight_decay)
            param[place] = self._round(p - F32(s.lr) * (m_hat / (F32(s.eps) + np.sqrt(v_hat))), place, step)
        return skipped
