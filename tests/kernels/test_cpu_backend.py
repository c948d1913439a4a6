"""The CPU kernel against the reference backend: every bit of parameters and state, after each step."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microadam_dist import MicroAdam
from microadam_dist.backends import cpu
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.cpu import CpuBackend
from microadam_dist.backends.select import AutoBackend, select_backend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError, ConfigError
from tests.amount import amount

from .cases import BF16, FP16, FP32, GRADIENTS, KERNEL_CASES, Case, is_replayed, part, replay_case, run_case
from .checks import (
    assert_same_bits,
    assert_same_every_16_bit_weight,
    assert_same_for_many_tensors,
    reference,
    same_bits,
)


def _isas() -> list[str]:
    try:
        return cpu.available_isas()
    except BackendUnavailableError:
        return []


ISAS = _isas()
if not ISAS:
    pytest.skip("the CPU kernel is not installed", allow_module_level=True)

_BY_NAME = {case.name: case for case in KERNEL_CASES}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_bit_identical_to_the_reference(case: Case, isa: str) -> None:
    for num_threads in (1, 2, 3):
        assert_same_bits(case, CpuBackend(isa, num_threads))


WINDOWS = [
    *({"window_size": size} for size in (1, 2, 3, 10)),
    *({"window_size": size, "packed_window": True} for size in (2, 5)),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, cols = draw(st.sampled_from([(1, 4096), (8, 600), (3, 5000), (70, 64), (2, 9001)]))
    start = draw(st.integers(0, rows * cols - 1))
    return Case(
        f"seed {draw(st.integers(0, 1000))}",
        part((rows, cols), start, draw(st.integers(1, rows * cols - start))),
        draw(st.sampled_from([FP32, BF16, FP16])),
        draw(st.sampled_from([FP32, BF16, FP16])),
        {
            **draw(st.sampled_from(WINDOWS)),
            "density": draw(st.sampled_from([0.001, 0.01, 0.05, 0.1, 0.5, 0.9, 1.0])),
            "block_size": draw(st.sampled_from([64, 200, 1000, 4096])),
            "bucket_size": draw(st.sampled_from([6, 16, 64, 96, 128, 4096])),
            "weight_decay": draw(st.sampled_from([0.0, 0.01, 3.0])),
            "correction": draw(st.sampled_from(["window", "steps"])),
            "rounding": draw(st.sampled_from(["auto", "nearest"])),
            "seed": draw(st.sampled_from([0, 1, 2**32 - 1])),
            "betas": (draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.9, 0.999]))),
        },
        draw(st.sampled_from(GRADIENTS)),
        num_steps=draw(st.sampled_from([2, 5, 12])),
        padding=draw(st.integers(0, 9)),
    )


@settings(deadline=None, max_examples=amount(600))
@given(case=cases())
def test_bit_identical_to_the_reference_with_any_settings(case: Case) -> None:
    for isa in ISAS:
        assert_same_bits(case, CpuBackend(isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, "nearest"), (BF16, "stochastic"), (FP16, "auto")], ids=str)
@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ((2**16,), 0.21),
        *(
            ((64, 2**10), x)
            for x in (1e-6, 2e-5, 2.0**-13, 1.01 * 2.0**-13, 2.0**-10, 1.01 * 2.0**-10, 2.0**-9, 0.21, 1.5)
        ),
    ],
    ids=str,
)
def test_every_16_bit_weight(shape: tuple[int, ...], dtype: torch.dtype, rounding: str, decay: float, isa: str) -> None:
    """Decay that changes many, few and no weights."""
    assert_same_every_16_bit_weight(CpuBackend(isa), shape, dtype, decay, rounding=rounding)


@pytest.mark.parametrize("isa", ISAS)
def test_weights_follow_from_the_window(isa: str) -> None:
    for case in filter(is_replayed, KERNEL_CASES):
        replay_case(case, CpuBackend(isa))


def test_one_call_for_many_tensors() -> None:
    assert_same_for_many_tensors(CpuBackend())


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
    expected = reference(_BY_NAME["tiny"])[-1]
    got = run_case(_BY_NAME["tiny"], _FlushingBackend())[-1]
    assert same_bits(got.param, expected.param)
    assert all(same_bits(got.state[name], tensor) for name, tensor in expected.state.items())


def test_no_tensors() -> None:
    assert CpuBackend().step([], MicroAdamConfig(), 1.0) == 0


# ---------------------------------------------------------------- selection


def test_devices_it_does_not_have() -> None:
    backend = select_backend("cpu")
    backend.check(torch.device("cpu"))
    with pytest.raises(BackendUnavailableError, match="cannot update a parameter on meta"):
        backend.check(torch.device("meta"))
    with pytest.raises(ConfigError, match="'sse9'.*portable"):
        CpuBackend("sse9")


def test_auto_takes_the_fastest_that_can_run() -> None:
    backend = select_backend("auto")
    assert isinstance(backend, AutoBackend)
    assert backend.choose(torch.device("cpu")).name == "cpu"
    assert backend.choose(torch.device("meta")).name == "reference"


def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.load_library.cache_clear()
    try:
        monkeypatch.setattr(cpu, "LIBRARY_NAME", "no_such_library.so")
        monkeypatch.delenv("MICROADAM_CPU_LIBRARY", raising=False)
        with pytest.raises(BackendUnavailableError, match=r"C\+\+ compiler.*pip install"):
            select_backend("cpu")
        auto = select_backend("auto")
        assert isinstance(auto, AutoBackend)
        assert auto.choose(torch.device("cpu")).name == "reference"
        assert "C++ compiler" in auto.unavailable["cpu"]
        _assert_large_models_are_warned_once(monkeypatch)
        broken = tmp_path / "broken.so"
        broken.write_bytes(b"not a library")
        monkeypatch.setenv("MICROADAM_CPU_LIBRARY", str(broken))
        with pytest.raises(BackendUnavailableError, match=r"cannot load .*broken\.so"):
            select_backend("cpu")
    finally:
        cpu.load_library.cache_clear()


def _assert_large_models_are_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microadam_dist.backends.select.LARGE_NUMEL", 65 * 64)
    for num_rows, num_warnings in ((64, 0), (65, 1)):
        param = torch.nn.Parameter(torch.ones(num_rows, 64))
        param.grad = torch.ones(num_rows, 64)
        optimizer = MicroAdam([param])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
            optimizer.step()
        messages = [str(warning.message) for warning in caught if "300 times slower" in str(warning.message)]
        assert len(messages) == num_warnings
        assert all("pip install --no-deps" in message for message in messages)


def test_backends_can_be_copied_and_pickled() -> None:
    backend = CpuBackend("portable", 2)
    run_case(_BY_NAME["normal"], backend)
    for twin in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert (twin.isa, twin.num_threads) == ("portable", 2)
    auto = pickle.loads(pickle.dumps(select_backend("auto")))
    assert auto.choose(torch.device("cpu")).name == "cpu"
