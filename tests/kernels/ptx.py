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

from .ptx_compute import TYPES, Array, compute, source_kinds

WARP = 32
OF_WARPS = ("shfl", "redux")  # instructions that all threads of a warp execute together
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
            kinds = source_kinds(name)
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
        assert name[3] == "u32" or name[2] == "add"
        assert (self._read(operands[2], "i4", threads) == -1).all(), "a reduction over a part of a warp"
        warps = self._read(operands[1], "u4", threads).reshape(-1, WARP)
        combine = {"add": np.add, "max": np.maximum}[name[2]]
        self._write(operands[0], combine.reduce(warps, axis=1, dtype="u4").repeat(WARP), threads)


def _elements(operand: str) -> list[str]:
    """The registers of ``{a, b}``, or the only one."""
    return re.findall(r"[^{},\s]+", operand)
