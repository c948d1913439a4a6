"""Single phases of the CUDA kernel, without the step around them, against the NumPy oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch

from .cases import GRADIENTS
from .cuda_harness import COMPILER, SOURCES, build
from .oracle import encode, top_k

if COMPILER is None:
    pytest.skip("no C++ compiler for the harness", allow_module_level=True)

# Those of harness/phases.cpp: threads, chunks, bucket size.
SETTINGS = ((32, 1, 64), (32, 3, 64), (64, 2, 8), (128, 1, 256), (32, 2, 6), (64, 1, 96))

Gradient = Callable[[torch.Generator, int, int], torch.Tensor]


def numbers(gradient: Gradient, numel: int) -> np.ndarray:
    return gradient(torch.Generator().manual_seed(numel), numel, 1).numpy()


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_top_k(gradient: Gradient, settings: tuple[int, int, int]) -> None:
    phases = build(SOURCES / "harness" / "phases.cpp")
    capacity = settings[0] * settings[1] * 16
    for numel in (capacity, capacity - 16, capacity - 37, 64, 1):
        a = numbers(gradient, numel)
        for num_kept in {1, numel // 100 + 1, numel // 7 + 1, numel - numel // 5, numel}:
            places, is_finite = np.empty(numel, np.int32), ctypes.c_int()
            counts = numel, num_kept, pointer(places), ctypes.byref(is_finite)
            assert phases.phase_top_k(*settings, pointer(a), *counts, numel % 2) == 1
            expected = top_k(list(a), num_kept)
            assert bool(is_finite) == (expected is not None)
            if expected is not None:
                assert np.flatnonzero(places >= 0).tolist() == expected
                assert places[expected].tolist() == list(range(num_kept))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gradient", [gradient for gradient in GRADIENTS if gradient.__name__ != "nonfinite"])
def test_encode(gradient: Gradient, settings: tuple[int, int, int]) -> None:
    phases = build(SOURCES / "harness" / "phases.cpp")
    capacity, bucket_size = settings[0] * settings[1] * 16, settings[2]
    for numel in (capacity, capacity - 16, capacity - 37, 64, 1):
        residual = numbers(gradient, numel)
        with np.errstate(all="ignore"):
            firsts = range(0, numel, bucket_size)
            buckets = [encode(list(residual[first : first + bucket_size]), 4, first, 0) for first in firsts]
            codes = [code for bucket in buckets for code in bucket.codes]
            lo, hi = ([bucket.stored[name] for bucket in buckets] for name in ("bucket_lo", "bucket_hi"))
        stored = np.full(-(-numel // 2), 255, np.uint8)
        ranges = np.zeros((2, len(lo)), np.uint16)
        for aligned in {0, numel % 16 == 0}:
            arrays = pointer(stored), pointer(ranges[0]), pointer(ranges[1])
            assert phases.phase_encode(*settings, pointer(residual), numel, aligned, *arrays, numel % 2) == 1
            assert np.stack([stored & 15, stored >> 4], 1).ravel().tolist() == codes + [0] * (numel % 2)
            np.testing.assert_array_equal((ranges.astype(np.uint32) << 16).view(np.float32), [lo, hi])
