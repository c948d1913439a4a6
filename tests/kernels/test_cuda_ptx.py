"""The CUDA kernel as NVRTC compiles it, run instruction by instruction, against the reference backend.

The harness of `test_cuda_kernel` replaces what only a GPU has; here these instructions, the compiler's options and its
layout of the tables are the real ones. Every memory access is checked, and shared memory for races. It is slow: few
blocks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microadam_dist.backends import nvrtc
from microadam_dist.backends.cuda_launch import Run
from microadam_dist.errors import BackendUnavailableError

from .cases import BF16, FP16, FP32, Case, nonfinite, part, replay_case, ties, whole
from .checks import assert_same_bits, assert_same_with_numbers_on_the_device
from .cuda_harness import Job, copy_with_mistake
from .ptx_backend import PtxBackend

try:
    nvrtc.nvrtc_version()
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)


_ROW = {"block_size": 4096, "window_size": 1, "density": 0.1, "weight_decay": 0.1}
ALIGNED = Case("default", whole(1, 4096), BF16, BF16, _ROW, num_steps=3, grad_scale=0.3, padding=16)
ODD = Case("odd", part((64, 301), 333, 1001), BF16, FP32, {"weight_decay": 0.1}, num_steps=6)
CASES = [
    ALIGNED,
    ODD,
    Case(
        "window 10", whole(1, 4096), FP32, BF16, {**_ROW, "window_size": 10, "density": 0.01}, num_steps=12, padding=16
    ),
    Case("window 2", whole(1, 4096), FP16, FP16, {**_ROW, "window_size": 2, "density": 0.05}, num_steps=3, padding=16),
    Case("most kept", part((64, 256), 0, 512), settings={"density": 0.7, "window_size": 3}, num_steps=4),
    Case(
        "packed window",
        part((64, 301), 333, 701),
        BF16,
        BF16,
        {"weight_decay": 0.1, "packed_window": True, "window_size": 3},
        nonfinite,
        num_steps=5,
    ),
    Case("ties", part((64, 256), 0, 512), gradient=ties, padding=16),
    Case("not finite", part((64, 256), 0, 512), FP16, BF16, gradient=nonfinite, num_steps=6),
    Case("bucket of 96", part((64, 256), 100, 512), BF16, BF16, {"bucket_size": 96}, num_steps=3),
    Case("bucket of 6", part((64, 256), 100, 512), settings={"bucket_size": 6}, num_steps=3),
    *(
        Case(f"{bits} bits", whole(1, 4096), BF16, BF16, {**_ROW, "ef_bits": bits}, num_steps=2, padding=16)
        for bits in (0, 1, 1.6, 2, 8)
    ),
    *(
        Case(f"{bits} bits, odd", part((64, 301), 333, 701), FP32, BF16, {"ef_bits": bits, "window_size": 2})
        for bits in (0, 1, 1.6, 2, 8)
    ),
    Case("1.6 bits, bucket of 96", part((64, 256), 100, 512), settings={"bucket_size": 96, "ef_bits": 1.6}),
    Case("dense", whole(300), BF16, BF16, {"weight_decay": 0.1}, gradient=nonfinite),
]
CASES += [
    replace(case, name=f"{case.name}, to nearest", settings={**case.settings, "rounding": "nearest"})
    for case in (ALIGNED, ODD, CASES[-1])
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bit_identical_to_the_reference(case: Case) -> None:
    assert_same_bits(case, PtxBackend())


@pytest.mark.parametrize("case", [ALIGNED, ODD], ids=str)
def test_for_another_architecture_and_order_of_warps(case: Case) -> None:
    assert_same_bits(case, PtxBackend("compute_80", warp_by_warp=True))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_follow_from_the_window(packed: bool) -> None:
    replay_case(replace(ODD, settings={"window_size": 3, "packed_window": packed}), PtxBackend())


def test_scalars_computed_on_the_device() -> None:
    backend = PtxBackend()
    assert_same_with_numbers_on_the_device(backend, torch.float32, num_rows=14, num_calls=3, param_dtype=BF16)


class FarBackend(PtxBackend):
    """Offsets of many billion elements, from pointers that are as far too low."""

    far = 2**33

    def _run(self, job: Job) -> None:
        launch, tables, window = job.launch, job.tables, int(job.macros["WINDOW_SIZE"])
        distance = {"param": 4, "grad": 4, "codes": 1 / 2, "bucket_lo": 2 / 64, "bucket_hi": 2 / 64}
        distance |= {"indices": window, "values": 2 * window}
        for name, element_bytes in distance.items():
            near = getattr(launch.tensors[0], name)
            setattr(launch.tensors[0], name, (near - int(self.far * element_bytes)) % 2**64)
        runs = (Run * tables.num_runs).from_buffer(tables.runs.numpy())
        for run in runs:
            run.elements.start += self.far
            run.codes.start += self.far // 2
            run.buckets.start += self.far // 64
            run.indices.start += self.far
            run.values.start += self.far
        super()._run(job)


def test_offsets_beyond_32_bits() -> None:
    assert_same_bits(replace(ODD, grad_dtype=FP32, param_dtype=FP32, name="far"), FarBackend())


# What the harness cannot see, and a barrier.
MISTAKES = {
    "two codes are exchanged": (
        "device.cuh",
        "cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;",
        "cvt.pack.sat.u4.s32.b32 %0, %2, %1, %3;",
    ),
    "two keys are exchanged": ("device.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
    "NaN is not the largest": ("device.cuh", "max.NaN.bf16x2", "max.bf16x2"),
    "a lane too many is added": ("device.cuh", "  @is_there add", "  add"),
    "no barrier before the weights are updated": (
        "window.cuh",
        "scalars);\n    }\n  }\n  __syncwarp();",
        "scalars);\n    }\n  }",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str, tmp_path: Path) -> None:
    sources = copy_with_mistake(tmp_path, *MISTAKES[mistake])
    watched = replace(ALIGNED, gradient=nonfinite, name="watched", settings={**_ROW, "window_size": 2}, num_steps=3)
    with pytest.raises(AssertionError):
        assert_same_bits(watched, PtxBackend(warp_by_warp=True, sources=sources))
