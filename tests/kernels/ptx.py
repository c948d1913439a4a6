"""Runs PTX, the GPU's assembly language, on the CPU: what NVRTC makes of the kernel, by the rules of the PTX manual.

All threads of a thread block execute an instruction at once; a register is an array with one entry a thread. Memory is
only what the caller names, and every access must lie in it and be aligned. There are the instructions that the kernel
needs, and an unknown one is an error.

Source: Parallel Thread Execution ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple

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
WARP = 32
OF_WARPS = ("shfl", "redux", "match", "vote")  # instructions that all threads of a warp execute together
WARP_BARRIER = ["bar", "warp"]
MAX_STEPS = 40_000  # of a thread block; more is a loop without an end
SHARED_BASE = 1024  # where shared memory begins, so that an offset is not taken for an address


class Instruction(NamedTuple):
    """``@guard name operands``, the name split at its dots."""

    guard: str
    name: list[str]
    operands: list[str]


class Kernel:
    """An ``.entry`` of a PTX module.

    Args:
        source: The module.
        name: The entry.

    Attributes:
        registers: Name -> storage type.
        labels: Name -> number of the instruction that follows.
    """

    def __init__(self, source: str, name: str) -> None:
        (text,) = (part for part in source.split(".entry ") if part.startswith(name))
        parameters, _, body = text.partition("{")
        (self.param,) = re.findall(r"(\w+)\[\d+\]", parameters)
        self.instructions: list[Instruction] = []
        self.registers: dict[str, Any] = {}
        self.labels: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self.shared_bytes = 0
        body = re.sub(r"(\$\w+:)", r"\1;", re.sub(r"//.*", "", body))
        for statement in re.split(r"[;\n]", body):
            self._parse(statement.strip())

    def _parse(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            for name in names.split(", "):
                stem, _, count = name.rstrip(">").partition("<")
                numbered = [f"{stem}{i}" for i in range(int(count))] if count else [stem]
                self.registers |= dict.fromkeys(numbered, np.bool_ if kind == ".pred" else f"u{int(kind[2:]) // 8}")
        elif text.startswith(".shared"):
            found = re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text)
            assert found and not self.shared, f"not understood: {text}"
            self.shared[found[2]] = SHARED_BASE
            self.shared_bytes = int(found[3])
        elif text.endswith(":"):
            self.labels[text[:-1]] = len(self.instructions)
        elif text.strip("{}") and not text.startswith("."):
            parts = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text)
            assert parts, f"not understood: {text}"
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", parts[3])
            self.instructions.append(Instruction(parts[1] or "", parts[2].split("."), operands))


class Memory:
    """Bytes at some addresses.

    Args:
        regions: (first address, bytes) of each region; they do not overlap.
    """

    def __init__(self, regions: Iterable[tuple[int, Array]]) -> None:
        self._regions = sorted(((start, data) for start, data in regions if len(data)), key=operator.itemgetter(0))
        self._starts = np.array([start for start, _ in self._regions], dtype="i8")
        self._ends = np.array([start + len(data) for start, data in self._regions], dtype="i8")

    def _rows(self, addresses: Array, num_bytes: int) -> Iterable[tuple[Array, Array, Array]]:
        """Region by region: its bytes, which of the addresses lie in it, and where."""
        assert not (addresses % num_bytes).any(), "an address is not aligned"
        found = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = (found >= 0) & (addresses + num_bytes <= self._ends[found])
        assert inside.all(), "an access outside of memory"
        for region in np.unique(found):
            members = np.flatnonzero(found == region)
            start, data = self._regions[region]
            yield data, members, (addresses[members] - start)[:, None] + np.arange(num_bytes)

    def load(self, addresses: Array, kind: Any, count: int = 1) -> Array:
        """``count`` neighbours from each address, (addresses, count)."""
        num_bytes = np.dtype(kind).itemsize * count
        out = np.empty((len(addresses), num_bytes), dtype="u1")
        for data, members, places in self._rows(addresses, num_bytes):
            out[members] = data[places]
        return out.view(kind)

    def store(self, addresses: Array, values: Array) -> None:
        """(addresses, count) values; of several at one address the last is kept."""
        rows = np.ascontiguousarray(values).view("u1")
        for data, members, places in self._rows(addresses, rows.shape[1]):
            data[places] = rows[members]


class Races:
    """Finds accesses to shared memory that no barrier puts in an order, as compute-sanitizer's racecheck does.

    Every thread counts the barriers it has passed, and learns at a barrier what the others there have counted.
    """

    _CONFLICTS = {"ld": ("st", "atom"), "st": ("ld", "st", "atom"), "atom": ("ld", "st")}  # noqa: RUF012

    def __init__(self, num_threads: int, num_bytes: int) -> None:
        self._known = np.eye(num_threads, dtype="i2")  # row: what a thread knows of all
        # Access -> for each byte the count at which each thread did it last.
        self._last = {access: np.zeros((num_bytes, num_threads), dtype="i2") for access in self._CONFLICTS}

    def access(self, access: str, threads: Array, addresses: Array, num_bytes: int) -> None:
        """Some threads access one address each."""
        places = (addresses[:, None] - SHARED_BASE + np.arange(num_bytes)).ravel()
        assert access != "st" or len(np.unique(places)) == len(places), "two threads store at one address"
        threads = threads.repeat(num_bytes)
        for other in self._CONFLICTS[access]:
            assert (self._last[other][places] <= self._known[threads]).all(), f"{access} races with {other}"
        self._last[access][places, threads] = self._known[threads, threads]

    def meet(self, threads: Array) -> None:
        """They have met at a barrier."""
        self._known[threads] = self._known[threads].max(axis=0)
        self._known[threads, threads] += 1


class ThreadBlock:
    """One thread block.

    Args:
        kernel: What its threads do.
        num_threads: A multiple of 32.
        index: Which block of the launch it is.
        param: Bytes of the kernel's only parameter.
        memory: Global memory.
        warp_by_warp: Each warp goes on as far as it can before the next one, the last one first; otherwise all threads
            keep together.
    """

    def __init__(
        self, kernel: Kernel, num_threads: int, index: int, param: bytes, memory: Memory, warp_by_warp: bool = False
    ) -> None:
        self._kernel, self._warp_by_warp = kernel, warp_by_warp
        self._registers = {name: np.zeros(num_threads, dtype=kind) for name, kind in kernel.registers.items()}
        self._symbols = {kernel.param: 0, **kernel.shared, "%ctaid.x": index}
        self._ids = np.arange(num_threads, dtype="u4")
        self._spaces = {
            "param": Memory([(0, np.frombuffer(param, dtype="u1"))]),
            "shared": Memory([(SHARED_BASE, np.full(kernel.shared_bytes, 0xA5, dtype="u1"))]),
            "global": memory,
        }
        self._races = Races(num_threads, kernel.shared_bytes)
        self._next = np.zeros(num_threads, dtype="i8")  # instruction of each thread; -1: it has ended
        self._barrier = np.full(num_threads, -1)  # that it waits at

    def run(self) -> None:
        """Execute it to the end.

        Raises:
            AssertionError: A wrong access, a race, a warp that is not together where it must be, a wait for ever.
        """
        with np.errstate(all="ignore"):
            for _ in range(MAX_STEPS):
                if (self._next < 0).all():
                    return
                ready = (self._next >= 0) & (self._barrier < 0)
                assert ready.any(), "threads wait for ever"
                if self._warp_by_warp:
                    ready &= self._ids // WARP == self._ids[ready][-1] // WARP
                threads = next(filter(len, map(self._who_can, np.unique(self._next[ready]), repeat(ready))), None)
                assert threads is not None, "a warp is never together"
                self._execute(self._kernel.instructions[self._next[threads[0]]], threads)
        raise AssertionError("threads run for ever")

    def _who_can(self, here: int, ready: Array) -> Array:
        """The threads that can execute an instruction now; at one for a whole warp its threads wait for each other."""
        threads: Array = np.flatnonzero(ready & (self._next == here))
        if self._kernel.instructions[here].name[0] in (*OF_WARPS, "bar"):
            warps, sizes = np.unique(threads // WARP, return_counts=True)
            threads = threads[np.isin(threads // WARP, warps[sizes == WARP])]
        return threads

    def _execute(self, instruction: Instruction, threads: Array) -> None:
        guard, name, operands = instruction
        self._next[threads] += 1
        if guard:
            holds = self._registers[guard.lstrip("!")][threads]
            threads = threads[~holds if guard.startswith("!") else holds]
        if not len(threads):
            return
        if name[0] == "bra":
            self._next[threads] = self._kernel.labels[operands[0]]
        elif name[0] == "ret":
            self._next[threads] = -1
        elif name[:2] == WARP_BARRIER:
            for warp in self._whole_warps(threads).reshape(-1, WARP):
                self._races.meet(warp)
        elif name[0] == "bar":
            self._wait(operands, threads)
        elif name[:2] == ["cp", "async"]:
            self._copy(name, operands, threads)
        elif name[0] == "red":
            self._atom(name, ["_", *operands], threads)
        elif name[0] in ("ld", "st", "atom"):
            getattr(self, f"_{name[0]}")(name, operands, threads)
        elif name[0] in OF_WARPS:
            getattr(self, f"_{name[0]}")(name, operands, self._whole_warps(threads))
        else:
            destination, *sources = operands
            kinds = _source_kinds(name)
            values = [self._read(*source, threads) for source in zip(sources, kinds, strict=False)]
            self._write(destination, compute(name, *values), threads)

    # ---------------------------------------------------------------- operands

    def _read(self, operand: str, kind: Any, threads: Array) -> Array:
        """The values of a register, the same for all threads of a number or symbol."""
        kind = np.dtype(kind)
        if operand.startswith("{"):
            names = _elements(operand)
            parts = [self._read(name, f"u{kind.itemsize // len(names)}", threads) for name in names]
            return np.stack(parts, axis=1).view(kind)[:, 0]
        if operand in self._registers:
            stored = self._registers[operand][threads]
            if kind.char == "?" or stored.dtype.itemsize == kind.itemsize:
                return stored.view(kind)
            return stored.astype(f"u{kind.itemsize}").view(kind)  # the lower bits
        if operand == "%tid.x":
            return self._ids[threads].astype(kind)
        if operand[:2] in ("0f", "0d"):
            bits: int = int(operand[2:], 16)
        else:
            bits = self._symbols[operand] if operand in self._symbols else int(operand, 0)
        number = np.array(bits % 2 ** (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)
        return np.broadcast_to(number, threads.shape)

    def _write(self, operand: str, values: Array, threads: Array) -> None:
        if operand.startswith("{"):
            names = _elements(operand)
            parts = np.ascontiguousarray(values)[:, None].view(f"u{values.itemsize // len(names)}")
            for i, name in enumerate(names):
                self._write(name, parts[:, i], threads)
            return
        if operand == "_":
            return
        register = self._registers[operand]
        if values.dtype != bool and values.dtype.itemsize == register.dtype.itemsize:
            values = np.ascontiguousarray(values).view(register.dtype)
        register[threads] = values.astype(register.dtype)  # of a wider register the upper bits are those of the sign

    def _addresses(self, operand: str, threads: Array) -> Array:
        base, _, offset = operand.strip("[]").partition("+")
        kind = f"u{self._registers[base].dtype.itemsize}" if base in self._registers else "u8"
        return self._read(base, kind, threads).astype("i8") + int(offset or 0)

    # ---------------------------------------------------------------- memory

    def _access(self, name: list[str], operand: str, threads: Array, count: int = 1) -> tuple[Memory, Array, Any]:
        """Where ``count`` neighbours are accessed: the memory, the addresses, and the type of each."""
        addresses, kind = self._addresses(operand, threads), np.dtype(TYPES[name[-1]])
        if name[1] == "shared":
            self._races.access(name[0], threads, addresses, count * kind.itemsize)
        return self._spaces.get(name[1], self._spaces["global"]), addresses, kind

    def _ld(self, name: list[str], operands: list[str], threads: Array) -> None:
        destinations = _elements(operands[0])
        space, addresses, kind = self._access(name, operands[1], threads, len(destinations))
        values = space.load(addresses, kind, len(destinations))
        for i, destination in enumerate(destinations):
            self._write(destination, values[:, i], threads)

    def _copy(self, name: list[str], operands: list[str], threads: Array) -> None:
        if operands:  # otherwise it waits for copies, which are done at once here
            values = self._spaces["global"].load(self._addresses(operands[1], threads), "u1", int(operands[2]))
            space, addresses, _ = self._access(["st", "shared", "b8"], operands[0], threads, int(operands[2]))
            space.store(addresses, values)

    def _st(self, name: list[str], operands: list[str], threads: Array) -> None:
        sources = _elements(operands[1])
        space, addresses, kind = self._access(name, operands[0], threads, len(sources))
        values = [self._read(source, kind, threads) for source in sources]
        space.store(addresses, np.stack(values, axis=1))

    def _atom(self, name: list[str], operands: list[str], threads: Array) -> None:
        space, addresses, kind = self._access(["atom", *name[1:]], operands[1], threads)
        values = self._read(operands[2], kind, threads)
        combine = {
            "add": np.add,
            "or": np.bitwise_or,
            "min": np.minimum,
            "max": np.maximum,
            "exch": lambda _, new: new,
        }[name[2]]
        before = np.empty_like(values)
        for i in range(len(threads)):  # one after the other
            old = space.load(addresses[i : i + 1], kind)
            before[i] = old[0, 0]
            space.store(addresses[i : i + 1], combine(old, values[i : i + 1, None]))
        self._write(operands[0], before, threads)

    # ---------------------------------------------------------------- threads together

    def _whole_warps(self, threads: Array) -> Array:
        assert len(threads) == WARP * len(np.unique(threads // WARP)), "a warp is not together"
        return threads

    def _wait(self, operands: list[str], threads: Array) -> None:
        (barrier,) = np.unique(self._read(operands[0], "i4", threads))
        self._barrier[self._whole_warps(threads)] = barrier
        expected = (
            np.array([len(self._ids)]) if len(operands) == 1 else np.unique(self._read(operands[1], "i4", threads))
        )
        assert len(expected) == 1, "threads expect different numbers at a barrier"
        arrived = self._barrier == barrier
        assert arrived.sum() <= expected[0], "too many threads at a barrier"
        if arrived.sum() == expected[0]:
            self._barrier[arrived] = -1
            self._races.meet(np.flatnonzero(arrived))

    def _shfl(self, name: list[str], operands: list[str], threads: Array) -> None:
        destination, _, predicate = operands[0].partition("|")
        values = self._read(operands[1], "u4", threads).reshape(-1, WARP)
        distance, clamp, members = (self._read(operand, "i4", threads).reshape(-1, WARP) for operand in operands[2:])
        assert (members == -1).all(), "a shuffle of a part of a warp"
        lane = np.arange(WARP)
        source = {"up": lane - distance, "bfly": lane ^ distance, "idx": distance}[name[2]]
        exists = source >= (clamp & 31) if name[2] == "up" else source <= (clamp & 31)
        source = np.where(exists, source, lane)
        self._write(destination, np.take_along_axis(values, source, axis=1).ravel(), threads)
        if predicate:
            self._write(predicate, exists.ravel(), threads)

    def _redux(self, name: list[str], operands: list[str], threads: Array) -> None:
        assert name[3] in ("u32", "b32") or name[2] == "add"
        assert (self._read(operands[2], "i4", threads) == -1).all(), "a reduction over a part of a warp"
        warps = self._read(operands[1], "u4", threads).reshape(-1, WARP)
        combine = {"add": np.add, "max": np.maximum, "or": np.bitwise_or}[name[2]]
        self._write(operands[0], combine.reduce(warps, axis=1, dtype="u4").repeat(WARP), threads)

    def _match(self, name: list[str], operands: list[str], threads: Array) -> None:
        assert name[1] == "any" and (self._read(operands[2], "i4", threads) == -1).all()
        warps = self._read(operands[1], "u4", threads).reshape(-1, WARP)
        same = warps[:, :, None] == warps[:, None, :]
        self._write(operands[0], (same << np.arange(WARP, dtype="u8")).sum(axis=2).astype("u4").ravel(), threads)

    def _vote(self, name: list[str], operands: list[str], threads: Array) -> None:
        assert name[2] == "any" and (self._read(operands[2], "i4", threads) == -1).all()
        guard = operands[1]
        holds = self._registers[guard.lstrip("!")][threads] ^ guard.startswith("!")
        self._write(operands[0], holds.reshape(-1, WARP).any(axis=1).repeat(WARP), threads)


# ---------------------------------------------------------------- instructions without side effects


def _elements(operand: str) -> list[str]:
    """The registers of ``{a, b}``, or the only one."""
    return re.findall(r"[^{},\s]+", operand)


def _source_kinds(name: list[str]) -> list[Any]:
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
        case ["clz", "b32"]:
            result = (32 - np.frexp(x[0].astype("f8"))[1]).astype("u4")
        case ["bfind", "u32"]:
            result = (np.frexp(x[0].astype("f8"))[1] - 1).astype("u4")
        case ["brev", "b32"]:
            result = sum(((x[0] >> i & 1) << (31 - i) for i in range(32)), np.zeros_like(x[0]))
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
        case ["cvt", "pack", "sat", "u4", "s32", "b32"]:
            first, second = (np.clip(value, 0, 15).astype("u4") for value in (x[1], x[0]))
            result = x[2] << 8 | second << 4 | first
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
