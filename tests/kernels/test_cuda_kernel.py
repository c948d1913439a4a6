"""The CUDA kernel against the reference backend, without a GPU: its own source under a harness of fibers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from microadam_dist.arithmetic.scalars import StepScalars
from microadam_dist.backends.cuda_launch import Shape, step_factors
from microadam_dist.config import MAX_BLOCK_SIZE, MicroAdamConfig
from tests.amount import some

from .cases import BF16, FP16, FP32, KERNEL_CASES, Case, is_replayed, replay_case
from .checks import (
    assert_same_bits,
    assert_same_every_16_bit_weight,
    assert_same_for_many_tensors,
    assert_same_with_numbers_on_the_device,
)
from .cuda_harness import COMPILER, HarnessBackend, copy_with_mistake

if COMPILER is None:
    pytest.skip("no C++ compiler for the harness", allow_module_level=True)

_BY_NAME = {case.name: case for case in KERNEL_CASES}


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_bit_identical_to_the_reference(case: Case) -> None:
    assert_same_bits(case, HarnessBackend())
    # The spans begin where vectors can be read.
    assert_same_bits(replace(case, padding=16), HarnessBackend(reverse=True))


def test_weights_follow_from_the_window() -> None:
    for case in some(filter(is_replayed, KERNEL_CASES)):
        replay_case(case, HarnessBackend())


CRAMPED = (
    *("normal", "ties", "nonfinite", "row-1001", "flat-shard", "float16-float16", "most-kept", "long-window"),
    *("paper-default-odd", "packed-odd", "packed-all-kept", "4096-5%-2", "4096-10%-1"),
    *("bucket-96", "bucket-192", "32767", "15000"),
)


@pytest.mark.parametrize("name", CRAMPED)
def test_with_little_space(name: str) -> None:
    case = replace(_BY_NAME[name], padding=16)
    assert_same_bits(case, HarnessBackend(cramped=True))
    if is_replayed(case):
        replay_case(case, HarnessBackend(cramped=True))


@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, "nearest"), (BF16, "stochastic"), (FP16, "auto")], ids=str)
@pytest.mark.parametrize(("shape", "decay"), [((2**16,), 0.21), ((64, 2**10), 0.0), ((64, 2**10), 0.21)], ids=str)
def test_every_16_bit_weight(shape: tuple[int, ...], dtype: torch.dtype, rounding: str, decay: float) -> None:
    assert_same_every_16_bit_weight(HarnessBackend(), shape, dtype, decay, rounding=rounding)


def test_one_call_for_many_tensors() -> None:
    assert_same_for_many_tensors(HarnessBackend())


def test_every_block_size_has_a_shape() -> None:
    for longest in range(1, MAX_BLOCK_SIZE + 1):
        shape = Shape.for_blocks(longest)
        assert shape.capacity >= longest and shape.threads <= 256
        assert shape.chunks == 1 or shape.threads > 128
        # Not one warp too many.
        assert (shape.threads - 32) * shape.chunks * 16 < longest


# ---------------------------------------------------------------- numbers that lie on the device


@pytest.mark.parametrize("lr_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("param_dtype", [FP32, BF16], ids=str)
def test_scalars_computed_on_the_device(lr_dtype: torch.dtype | None, param_dtype: torch.dtype) -> None:
    assert_same_with_numbers_on_the_device(HarnessBackend(), lr_dtype, param_dtype=param_dtype)


@pytest.mark.parametrize("correction", ["window", "steps"])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.0, 0.0)])
def test_step_factors_hold_for_ever(betas: tuple[float, float], correction: str) -> None:
    config = MicroAdamConfig(betas=betas, correction=correction, window_size=3)
    factors = step_factors(config, torch.device("cpu"))
    last = len(factors) - 1
    for step in (0, 1, 9, last // 2, last, last + 1, 10 * last + 1000):
        expected = StepScalars.at(step, config, 1.0)
        names = ("m_factor", "v_factor", "m_correction", "v_correction")
        assert factors[min(step, last)].tolist() == [getattr(expected, name) for name in names]


# ---------------------------------------------------------------- the tests see mistakes

MISTAKES = {
    "ties to the highest index": (
        "topk.cuh",
        "mask ^= 1u << highest_bit(mask);",
        "mask &= mask - 1;",
    ),
    "a kept element is not cleared": ("window.cuh", "scale) : 0.f;", "scale) : a[j];"),
    "two keys are exchanged": (
        "topk.cuh",
        "bf16_pair(a[c][2 * i], a[c][2 * i + 1])",
        "bf16_pair(a[c][2 * i + 1], a[c][2 * i])",
    ),
    "two codes are exchanged": (
        "error_feedback.cuh",
        "is_first ? level(j) : 0, is_second ? level(j + 1) : 0",
        "is_second ? level(j + 1) : 0, is_first ? level(j) : 0",
    ),
    "slots are summed from the newest": (
        "window.cuh",
        "int age = s.scalars.num_weights - 1; age >= (Traits::kReplays ? 0 : 1); --age",
        "int age = 1; age < s.scalars.num_weights; ++age",
    ),
    "no barrier between slots": ("window.cuh", "sync_threads_beside(num_threads);", ";"),
    "no barrier before the weights are updated": (
        "window.cuh",
        "scalars);\n    }\n  }\n  __syncwarp();",
        "scalars);\n    }\n  }",
    ),
    "the error is not rounded to even": (
        "error_feedback.cuh",
        "scaled * as_float(1u)",
        "(scaled + 1e-3f) * as_float(1u)",
    ),
    "the last bucket reads beyond the block": (
        "error_feedback.cuh",
        "if (!Traits::kAligned && j >= count) continue;",
        "",
    ),
    "an element that only older slots hold is left": ("window.cuh", "s.touched[threadIdx.x] | kept.mask", "kept.mask"),
    "an empty slot keeps old values": ("slot.cuh", "store_entry(i, i, 0, s);", ";"),
    "packed: an index loses its upper bits": (
        "slot.cuh",
        "[1] |= static_cast<uint8>((entry & 15u) << 4);",
        "[1] |= static_cast<uint8>((entry & 7u) << 4);",
    ),
    "the noise of all blocks is the same": ("block.cuh", "place.origin + element", "place.origin"),
    "two elements have the same noise": ("rounding.cuh", "counter + 2 * i * kPositionFactor", "counter"),
    "noise is not cut off": ("rounding.cuh", "* kNoiseFactor >> 16", "* kNoiseFactor >> 15"),
    "packed: the rounding error is lost": (
        "window.cuh",
        "a[j] - stored_value(to_float(Bf16{bf16_bits(a[j])}), scale)",
        "0.f",
    ),
    "packed: the scale is that of a warp": (
        "topk.cuh",
        "atomicMax(&s.largest_key, largest);",
        "s.largest_key = largest;",
    ),
}
_WATCHED = [
    "normal",
    "normal-packed",
    "4096-5%-2-packed",
    "ties",
    "nonfinite",
    "shifted",
    "most-kept",
    "bfloat16-bfloat16",
    "normal-bf16",
    "row-1000",
    "one-kept-odd",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str, tmp_path: Path) -> None:
    """Each of them, planted in the source, makes a case fail."""
    sources = copy_with_mistake(tmp_path, *MISTAKES[mistake])
    for name in _WATCHED:
        for padding in (7, 16):
            for reverse in (False, True):
                try:
                    assert_same_bits(replace(_BY_NAME[name], padding=padding), HarnessBackend(reverse, sources=sources))
                except AssertionError:
                    return
    pytest.fail("no case noticed")
