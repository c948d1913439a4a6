"""The results of the PTX instructions that neither touch memory nor other threads, on arrays with an entry a thread."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TYPES: dict[str, Any] = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16x2": "u4",
    **{f"{kind}{8 * size}": f"{'i' if kind == 's' else 'u'}{size}" for kind in "bsu" for size in (1, 2, 4, 8)},
}


def source_kinds(name: list[str]) -> list[Any]:
    """The types of what an instruction reads."""
    kind = TYPES[name[-1]]
    if name[0] in ("shl", "shr"):
        return [kind, "u4"]
    if name[0] == "selp":
        return [kind, kind, np.bool_]
    if name[:2] == ["cvt", "pack"]:
        return ["i4", "i4", "u4"]
    return [kind] * 3


def compute(name: list[str], *x: Array) -> Array:
    """The result of an instruction on the values of its operands, which have the types that its name says."""
    result: Array
    match name:
        case ["mov" | "cvta", *_]:
            result = x[0]
        case ["add", *_]:
            result = x[0] + x[1]
        case ["sub", *_]:
            result = x[0] - x[1]
        case ["mul", "lo" | "rn", _]:
            result = x[0] * x[1]
        case ["mul", "hi" | "wide" as part, kind]:
            product = x[0].astype(f"{TYPES[kind][0]}8") * x[1]
            result = product if part == "wide" else (product >> 32).astype(TYPES[kind])
        case ["mad", "lo", _]:
            result = x[0] * x[1] + x[2]
        case ["fma", "rn", "f32"]:
            result = _fused_multiply_add(*x)
        case ["div", "rn", "f32"]:
            result = x[0] / x[1]
        case ["rcp", "rn", "f32"]:
            result = np.float32(1) / x[0]
        case ["sqrt", "rn", "f32"]:
            result = np.sqrt(x[0])
        case ["div", "u32"]:
            result = x[0] // x[1]
        case ["rem", "u32" | "u64"]:
            result = x[0] % x[1]
        case ["rem", "s32" | "s64"]:
            result = np.fmod(x[0], x[1])
        case ["abs", "f32"]:
            result = np.abs(x[0])
        case ["neg", *_]:
            result = -x[0]
        case ["min", "f32"]:
            result = np.where(x[0] == x[1], _as_bits(x[0]) | _as_bits(x[1]), _as_bits(np.fmin(*x)))  # -0 below +0
        case ["max", "f32"]:
            result = np.where(x[0] == x[1], _as_bits(x[0]) & _as_bits(x[1]), _as_bits(np.fmax(*x)))
        case ["max", "NaN", "f32"]:
            result = np.where(np.isnan(x[0] + x[1]), np.float32(np.nan), compute(["max", "f32"], *x).view("f4"))
        case ["min" | "max" as which, *nan, "bf16x2"]:
            result = _of_pairs(which, nan == ["NaN"], *x)
        case ["dp4a", "u32", "u32"]:
            result = sum(((x[0] >> i & 0xFF) * (x[1] >> i & 0xFF) for i in range(0, 32, 8)), x[2])
        case ["bfind", "u32"]:
            result = (np.frexp(x[0].astype("f8"))[1] - 1).astype("u4")
        case ["min", _]:
            result = np.minimum(*x)
        case ["max", _]:
            result = np.maximum(*x)
        case ["and", *_]:
            result = x[0] & x[1]
        case ["or", *_]:
            result = x[0] | x[1]
        case ["xor", *_]:
            result = x[0] ^ x[1]
        case ["not", *_]:
            result = ~x[0]
        case ["shl", _]:
            result = np.where(x[1] < 8 * x[0].itemsize, x[0] << x[1].astype(x[0].dtype), 0).astype(x[0].dtype)
        case ["shr", _]:
            result = x[0] >> np.minimum(x[1], 8 * x[0].itemsize - 1).astype(x[0].dtype)
            result = np.where((x[1] >= 8 * x[0].itemsize) & (x[0] >= 0), 0, result).astype(x[0].dtype)
        case ["shf", "l", "wrap", "b32"]:
            both = x[1].astype("u8") << 32 | x[0]
            result = (both << (x[2] & 31) >> 32).astype("u4")
        case ["prmt", "b32"]:
            result = _permute_bytes(*x)
        case ["popc", "b32"]:
            result = sum((x[0] >> i & 1 for i in range(32)), np.zeros_like(x[0]))
        case ["selp", _]:
            result = np.where(x[2], x[0], x[1])
        case ["setp", "neu", _]:
            result = x[0] != x[1]
        case ["setp", "ltu", _]:
            result = ~(x[0] >= x[1])
        case ["setp", ("eq" | "ne" | "lt" | "le" | "gt" | "ge") as relation, _]:
            result = getattr(operator, relation)(*x)
        case ["cvt", "pack", "sat", "u2" | "u4" | "u8" as kind, "s32", "b32"]:
            bits = int(kind[1:])
            first, second = (np.clip(value, 0, 2**bits - 1).astype("u4") for value in (x[1], x[0]))
            result = x[2] << 2 * bits | second << bits | first
        case ["cvt", "rn", "bf16x2", "f32"]:
            result = _bf16(x[0]) << 16 | _bf16(x[1])
        case ["cvt", *_, ("f16" | "f32" | "f64") as to, "f16" | "f32" | "f64"]:
            result = x[0].astype(TYPES[to])
        case ["cvt", "rni", "s32", "f32"]:
            result = np.rint(x[0]).astype("i4")
        case ["cvt", "rn", "f32", "s32"]:
            result = x[0].astype("f4")
        case ["cvt", to, kind] if "f" not in to + kind:
            result = x[0].astype(TYPES[to])
        case _:
            raise NotImplementedError(".".join(name))
    return result


def _as_bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view("u4")


def _bf16(x: Array) -> Array:
    """The bf16 number nearest to an fp32 one, of two the even one."""
    bits = _as_bits(x)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u4")


def _of_pairs(which: str, nan_wins: bool, a: Array, b: Array) -> Array:
    """The smaller or larger one of two bf16 numbers in each half, -0 below +0."""
    halves = [np.ascontiguousarray(x).view("i2").astype("i4") for x in (a, b)]
    sign = 1 if which == "max" else -1
    order = [sign * np.where(x < 0, -(x & 0x7FFF) - 1, x) for x in halves]
    order = [
        np.where((x & 0x7FFF) > 0x7F80, (1 if nan_wins else -1) << 20, y) for x, y in zip(halves, order, strict=True)
    ]
    return np.where(order[0] > order[1], *halves).astype("i2").view("u4")


def _permute_bytes(low: Array, high: Array, selector: Array) -> Array:
    """Each byte of the result is one of eight, or eight times its sign."""
    both = high.astype("u8") << 32 | low
    result = np.zeros_like(low)
    for i in range(4):
        choice = selector >> 4 * i & 0xF
        byte = both >> (8 * (choice & 7)) & 0xFF
        result |= np.where(choice & 8, (byte >> 7) * 0xFF, byte).astype("u4") << 8 * i
    return result


def _fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c rounded once."""
    product, addend = a.astype("f8") * b, c.astype("f8")  # the product is exact
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)  # what the sum has lost
    # Rounded to odd, which a second rounding to fp32 cannot spoil.
    bits = total.view("i8")
    inexact = np.isfinite(total) & (rest != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((rest > 0) == (total > 0), 1, -1), bits).view("f8").astype("f4")
