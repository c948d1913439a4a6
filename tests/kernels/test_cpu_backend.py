"""The CPU kernel against the reference backend: every bit of parameters and state, after each step."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microadam_dist.backends import cpu
from microadam_dist.backends.base import AutoBackend, Backend, TensorStep, select_backend
from microadam_dist.backends.cpu import CpuBackend
from microadam_dist.backends.reference import ReferenceBackend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError, ConfigError
from microadam_dist.layout import ShardSpan, StateLayout
from microadam_dist.state import allocate_state

from .cases import (
    BF16,
    CASES,
    FP16,
    FP32,
    Case,
    Snapshot,
    constant,
    is_replayed,
    nonfinite,
    replay_case,
    run_case,
    ties,
    whole,
)


def _isas() -> list[str]:
    try:
        return cpu.available_isas()
    except BackendUnavailableError:
        return []


ISAS = _isas()
if not ISAS:
    pytest.skip("the CPU kernel is not installed", allow_module_level=True)

# Lengths and settings the kernel treats in its own ways: whole and partial tiles of 64, groups that are merged or too
# few for the number kept, buckets of one tile, several and no whole number of them.
_LONG = {"block_size": 4096, "weight_decay": 0.1}
CPU_CASES = [
    *(case for case in CASES if case.config.ef_bits == 4),
    Case("4096-1%-10", whole(3, 8192), settings={**_LONG, "density": 0.01, "window_size": 10}, num_steps=12),
    Case("4096-5%-2", whole(3, 8192), BF16, BF16, settings={**_LONG, "density": 0.05, "window_size": 2}),
    Case("4096-10%-1", whole(3, 8192), settings={**_LONG, "density": 0.1, "window_size": 1}),
    Case("4096-30%", whole(3, 8192), FP16, FP16, settings={**_LONG, "density": 0.3}),
    Case("2752", whole(2, 11008), BF16, FP32, settings={**_LONG, "density": 0.01}),
    Case("4096-ties", whole(3, 8192), settings=_LONG, gradient=ties),
    Case("4096-constant", whole(3, 8192), settings=_LONG, gradient=constant),
    Case("4096-nonfinite", whole(3, 8192), FP16, BF16, settings=_LONG, gradient=nonfinite),
    Case("32768", whole(2, 32768), settings={"block_size": 32768, "density": 0.01}),
    Case("32768-all-kept", whole(2, 32768), settings={"block_size": 32768, "density": 1.0}, num_steps=3),
    Case("32767", whole(2, 32767), BF16, BF16, settings={"block_size": 32768, "bucket_size": 2}, num_steps=3),
    Case("bucket-128", whole(3, 4096), settings={**_LONG, "bucket_size": 128}),
    Case("bucket-192", whole(3, 4095), settings={**_LONG, "bucket_size": 192}),
    Case("bucket-32", whole(3, 4099), settings={**_LONG, "bucket_size": 32}),
    Case("bucket-96", whole(3, 4099), FP16, FP16, settings={**_LONG, "bucket_size": 96}),
]
_BY_NAME = {case.name: case for case in CPU_CASES}


@functools.cache
def reference(name: str) -> list[Snapshot]:
    return run_case(_BY_NAME[name], ReferenceBackend())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that any NaN equals any NaN."""
    numbers = torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(x.view(torch.uint8) for x in numbers))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_bit_identical_to_the_reference(case: Case, isa: str) -> None:
    for num_threads in (1, 2, 3):
        got = run_case(case, CpuBackend(isa, num_threads))
        for step, (expected, actual) in enumerate(zip(reference(case.name), got, strict=True)):
            where = f"step {step}, {num_threads} threads"
            assert actual.num_nonfinite == expected.num_nonfinite, where
            assert same_bits(actual.param, expected.param), f"param, {where}"
            for name, tensor in expected.state.items():
                assert same_bits(actual.state[name], tensor), f"{name}, {where}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ((2**16,), 0.21),
        *(((64, 2**10), x) for x in (1e-6, 2.0**-13, 1.01 * 2.0**-13, 2.0**-10, 1.01 * 2.0**-10, 2.0**-9, 0.21, 1.5)),
    ],
    ids=str,
)
def test_every_16_bit_weight(shape: tuple[int, ...], dtype: torch.dtype, decay: float, isa: str) -> None:
    """All 2**16 weights and gradients, NaN and subnormal ones among them; decay that changes many, few and no weights.

    The kernel leaves weights alone that decay cannot change, which depends on 1 - lr * weight_decay.
    """
    config = MicroAdamConfig(lr=2.0**-7, weight_decay=decay * 2.0**7, block_size=64)
    layout = StateLayout((ShardSpan("all", shape, 0, 2**16),), config)
    weights = torch.arange(2**16, dtype=torch.int32).short().view(dtype)
    results = []
    for backend in (ReferenceBackend(), CpuBackend(isa)):
        param, state = weights.clone(), allocate_state(layout, weights.device)
        for step, grad in enumerate((weights.flip(0), torch.zeros_like(weights))):
            backend.step([TensorStep(param, grad, state, layout, step)], config, 2.0**-20)
        results.append([param, *state.values()])
    assert all(same_bits(expected, actual) for expected, actual in zip(*results, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_weights_follow_from_the_window(isa: str) -> None:
    for case in filter(is_replayed, CPU_CASES):
        replay_case(case, CpuBackend(isa))


def _many_tensors(backend: Backend, num_calls: int, one_by_one: bool) -> list[Tensor]:
    config = MicroAdamConfig(lr=1e-2, block_size=256, window_size=3)
    generator = torch.Generator().manual_seed(0)
    tensors: list[TensorStep] = []
    for i in range(40):
        shape = ((i + 1, 300), (i + 7,), (70, 64 + i))[i % 3]
        layout = StateLayout((ShardSpan(str(i), shape, 0, math.prod(shape)),), config)
        param = torch.randn(math.prod(shape), generator=generator).to((FP32, BF16, FP16)[i % 3])
        tensors.append(TensorStep(param, param, allocate_state(layout, param.device), layout, 0))
    for call in range(num_calls):
        now = [
            TensorStep(t.param, torch.randn(t.param.shape, generator=generator), t.state, t.layout, call + i % 2)
            for i, t in enumerate(tensors)
        ]
        for members in [[t] for t in now] if one_by_one else [now]:
            backend.step(members, config, 1.0)
    return [tensor for t in tensors for tensor in (t.param, *t.state.values())]


def test_one_call_for_many_tensors() -> None:
    expected = _many_tensors(ReferenceBackend(), num_calls=4, one_by_one=True)
    actual = _many_tensors(CpuBackend(), num_calls=4, one_by_one=False)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_copy_of_the_weights(dtype: torch.dtype) -> None:
    config = MicroAdamConfig(lr=1e-2, block_size=256)
    spans = ShardSpan("a", (64, 100), 30, 5000, 3), ShardSpan("b", (77,), 0, 77, 5010)
    layout = StateLayout(spans, config)
    param, out = torch.randn(5100).to(dtype), torch.zeros(5100, dtype=BF16)
    state = allocate_state(layout, param.device)
    for step in range(3):
        grad = nonfinite(torch.Generator().manual_seed(step), 5100, step)
        CpuBackend().step([TensorStep(param, grad, state, layout, step, out)], config, 1.0)
        for span in spans:
            span_slice = slice(span.offset, span.offset + span.numel)
            assert torch.equal(out[span_slice], param[span_slice].bfloat16())
    outside = torch.cat([out[:3], out[5003:5010], out[5087:]])
    assert not outside.any()


class _FlushingBackend(CpuBackend):
    """Called by a thread that takes subnormal numbers for zero."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        assert torch.set_flush_denormal(True)
        try:
            num_skipped = super().step(tensors, config, grad_scale)
            assert not (torch.full((), 1e-40) * 1.5).any(), "the mode of the caller was not restored"
        finally:
            torch.set_flush_denormal(False)
        return num_skipped


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU cannot flush subnormal numbers")
def test_subnormal_numbers_are_kept() -> None:
    expected = reference("tiny")[-1]
    got = run_case(_BY_NAME["tiny"], _FlushingBackend())[-1]
    assert same_bits(got.param, expected.param)
    assert all(same_bits(got.state[name], tensor) for name, tensor in expected.state.items())


def test_no_tensors() -> None:
    assert CpuBackend().step([], MicroAdamConfig(), 1.0) == 0


# ---------------------------------------------------------------- selection


def test_settings_and_devices_it_does_not_have() -> None:
    backend = select_backend("cpu")
    backend.check(MicroAdamConfig(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r'ef_bits=2.*backend="reference"'):
        backend.check(MicroAdamConfig(ef_bits=2), torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match="cannot update a parameter on meta"):
        backend.check(MicroAdamConfig(), torch.device("meta"))
    with pytest.raises(ConfigError, match="'sse9'.*portable"):
        CpuBackend("sse9")


def test_auto_takes_the_fastest_that_can_run() -> None:
    backend = select_backend("auto")
    assert isinstance(backend, AutoBackend)
    assert backend.choose(MicroAdamConfig(), torch.device("cpu")).name == "cpu"
    assert backend.choose(MicroAdamConfig(ef_bits=8), torch.device("cpu")).name == "reference"
    assert backend.choose(MicroAdamConfig(), torch.device("meta")).name == "reference"


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.load_library.cache_clear()
    try:
        monkeypatch.setattr(cpu, "LIBRARY_NAME", "no_such_library.so")
        monkeypatch.delenv("MICROADAM_CPU_LIBRARY", raising=False)
        with pytest.raises(BackendUnavailableError, match=r"C\+\+ compiler.*pip install"):
            select_backend("cpu")
        auto = select_backend("auto")
        assert isinstance(auto, AutoBackend)
        assert auto.choose(MicroAdamConfig(), torch.device("cpu")).name == "reference"
        assert "C++ compiler" in auto.unavailable["cpu"]
        broken = tmp_path / "broken.so"
        broken.write_bytes(b"not a library")
        monkeypatch.setenv("MICROADAM_CPU_LIBRARY", str(broken))
        with pytest.raises(BackendUnavailableError, match=r"cannot load .*broken\.so"):
            select_backend("cpu")
    finally:
        cpu.load_library.cache_clear()


def test_backends_can_be_copied_and_pickled() -> None:
    backend = CpuBackend("portable", 2)
    run_case(_BY_NAME["normal"], backend)
    for twin in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert (twin.isa, twin.num_threads) == ("portable", 2)
    auto = pickle.loads(pickle.dumps(select_backend("auto")))
    assert auto.choose(MicroAdamConfig(), torch.device("cpu")).name == "cpu"
