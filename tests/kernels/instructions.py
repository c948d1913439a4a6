"""Counts the instructions that a GPU executes in a step, without a GPU.

What NVRTC compiles is disassembled, and its PTX is run by `ptx`. Both name the source line of every instruction, with
the calls that led there; how often a warp executes an instruction of a line is taken from the run. The compiler moves
instructions but hardly between lines, so the sum is that of a profiler within 2 %.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .cuda_harness import SOURCES, Job
from .ptx import WARP, Array, Instruction, Kernel, ThreadBlock
from .ptx_backend import PtxBackend, compile_with_lines, global_memory

Calls = tuple[tuple[str, int], ...]  # (file, line) from the innermost call to the kernel

_CALL = re.compile(r'//## File "([^"]*)", line (\d+)(?: inlined at)?')


def disassembler() -> Path | None:
    """``nvdisasm`` from the package nvidia-cuda-nvdisasm, if it is installed."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvdisasm"), None)


class MachineInstruction(NamedTuple):
    """Of a kernel that was compiled with line numbers.

    Attributes:
        calls: That led to it.
        is_guarded: Whether a predicate decides if it has an effect; a warp executes it anyway.
    """

    calls: Calls
    is_guarded: bool


def basic_blocks(cubin: bytes, kernel: str) -> list[list[MachineInstruction]]:
    """The instructions of a kernel; those of one list are executed one after the other.

    Left out is what happens in rare cases only: division and square root of numbers outside the normal range, and
    exchanges in a warp that is not together.
    """
    program = disassembler()
    assert program is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-gi", file.name], capture_output=True, text=True, check=True).stdout
    (body,) = re.findall(rf"^\.text\.{kernel}:\n(.*?)(?=^//-----|^\$__internal|\Z)", text, re.M | re.S)
    blocks: list[list[MachineInstruction]] = [[]]
    calls: list[tuple[str, int]] = []
    is_complete = True  # the last call that was read is the kernel's
    for line in body.splitlines():
        if place := _CALL.search(line):
            if is_complete:
                calls = []
            calls.append((Path(place[1]).name, int(place[2])))
            is_complete = "inlined at" not in line
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+)?\s*(\w+)", line):
            blocks[-1].append(MachineInstruction(tuple(calls), instruction[1] is not None))
            if instruction[2] in ("CALL", "ENDCOLLECTIVE"):
                blocks[-1] = []
            elif instruction[2] in ("BRA", "EXIT"):
                blocks.append([])
        elif line.endswith(":"):
            blocks.append([])
    return [block for block in blocks if block]


class LocatedKernel(Kernel):
    """A `Kernel` of PTX with line numbers.

    Attributes:
        calls: Of each instruction.
    """

    def __init__(self, source: str, name: str) -> None:
        self.calls: list[Calls] = []
        self._files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', source)}
        self._outer: dict[tuple[str, ...], Calls] = {}  # the latest calls that led to a place
        self._here: Calls = ()
        super().__init__(source, name)

    def _parse(self, text: str) -> None:
        place = re.match(r"\.loc\s+(\d+) (\d+) (\d+)(?:, function_name \S+, inlined_at (\d+) (\d+) (\d+))?", text)
        if place:
            file, line, column, *outer = place.groups()
            called_from = self._outer.get(tuple(outer), ()) if outer[0] else ()
            self._here = ((self._files[file], int(line)), *called_from)
            self._outer[file, line, column] = self._here
        super()._parse(text)
        if len(self.instructions) > len(self.calls):
            self.calls.append(self._here)


class CountingBlock(ThreadBlock):
    """A `ThreadBlock` that counts.

    Attributes:
        executed: For each instruction of the kernel how often a warp has executed it.
    """

    def __init__(self, kernel: Kernel, *args: object, **kwargs: object) -> None:
        super().__init__(kernel, *args, **kwargs)  # type: ignore[arg-type]
        self.executed = np.zeros(len(kernel.instructions), dtype="i8")

    def _execute(self, instruction: Instruction, threads: Array) -> None:
        self.executed[self._next[threads[0]]] += len(np.unique(threads // WARP))
        super()._execute(instruction, threads)


class CountingBackend(PtxBackend):
    """Counts what the step of a tensor executes, for one architecture.

    Attributes:
        per_element: Instructions that all warps execute, times 32 and divided by elements, by phase: what a line of
            block_step.cuh calls.
        barriers: Of a whole thread block, that each of its warps meets.
    """

    def __init__(self, arch: str = "90", sources: Path = SOURCES) -> None:
        super().__init__(f"compute_{arch}", sources=sources)
        self._machine = f"sm_{arch}"
        self._lines = {path.name: path.read_text().splitlines() for path in sources.glob("*.cu*")}
        self.per_element: Counter[str] = Counter()
        self.barriers = 0.0

    def _run(self, job: Job) -> None:
        launch, tables, macros = job.launch, job.tables, job.macros
        ptx = compile_with_lines(macros, self._arch, self._sources).decode()
        kernel = LocatedKernel(ptx, "microadam_step")
        executed = np.zeros(len(kernel.instructions))
        for index in range(tables.num_blocks):
            running = CountingBlock(kernel, tables.shape.threads, index, bytes(launch), global_memory(job.memory))
            running.run()
            executed += running.executed
        is_barrier = [(name[0], operands) == ("bar", ["0"]) for _, name, operands in kernel.instructions]
        self.barriers = float(executed[is_barrier].sum()) * WARP / (tables.shape.threads * tables.num_blocks)
        counts: dict[Calls, list[float]] = {}
        for calls, count in zip(kernel.calls, executed, strict=True):
            counts.setdefault(calls, []).append(count)
        times = {calls: statistics.fmean(found) for calls, found in counts.items()}

        def times_of(instruction: MachineInstruction) -> float:
            calls = instruction.calls
            return next((times[calls[i:]] for i in range(len(calls)) if calls[i:] in times), 0.0)

        cubin = compile_with_lines(macros, self._machine, self._sources)
        for block in basic_blocks(cubin, "microadam_step"):
            certain = [instruction for instruction in block if not instruction.is_guarded] or block
            executions = statistics.median(map(times_of, certain))
            for instruction in block:
                phase = self._phase(instruction.calls)
                self.per_element[phase] += float(executions) * WARP / (tables.num_blocks * tables.longest)

    def _phase(self, calls: Calls) -> str:
        lines = (self._lines[file][line - 1].strip() for file, line in calls if file == "block_step.cuh")
        text = next(lines, "microadam_step")
        called = re.search(r"([a-z_]+)(?:<\w+>)?\(", text)
        return called[1] if called else text
