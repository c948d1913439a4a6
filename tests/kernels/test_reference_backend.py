"""The reference backend against the scalar oracle: every parameter and state tensor, bit for bit, after each step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from microadam_dist.backends.reference import ReferenceBackend

from .cases import CASES, Case, is_replayed, make_inputs, replay_case, run_case
from .oracle import ScalarMicroAdam


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_bit_identical_to_the_oracle(case: Case) -> None:
    param, grads = make_inputs(case)
    spans = [(s.global_shape, s.start, s.numel, s.offset) for s in case.layout.spans]
    oracle = ScalarMicroAdam(spans, case.config, str(case.param_dtype).removeprefix("torch."))
    expected = param.float().numpy().copy()
    for step, (grad, got) in enumerate(zip(grads, run_case(case, ReferenceBackend()), strict=True)):
        num_nonfinite = oracle.step(expected, grad.float().numpy(), step, case.grad_scale)
        assert got.num_nonfinite == num_nonfinite, f"step {step}"
        np.testing.assert_array_equal(got.param.float().numpy(), expected, err_msg=f"param, step {step}")
        for name, values in _flat_state(oracle, case).items():
            np.testing.assert_array_equal(_numbers(got.state[name], name, case), values, err_msg=f"{name}, step {step}")


@pytest.mark.parametrize("case", [case for case in CASES if is_replayed(case)], ids=str)
def test_weights_follow_from_the_window(case: Case) -> None:
    replay_case(case, ReferenceBackend())


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "row-1001")
    whole = run_case(case, ReferenceBackend())[-1]
    monkeypatch.setattr("microadam_dist.backends.reference.CHUNK_NUMEL", 3000)  # two rows and a bit
    chunked = run_case(case, ReferenceBackend())[-1]
    assert torch.equal(whole.param.nan_to_num(), chunked.param.nan_to_num())
    assert all(torch.equal(whole.state[name], chunked.state[name]) for name in whole.state)


def _flat_state(oracle: ScalarMicroAdam, case: Case) -> dict[str, np.ndarray]:
    """The oracle's state in the order of the package's tensors; slots that were never written are zero."""
    s = case.config
    state: dict[str, list[float]] = {}
    if oracle.blocks and s.ef_bits:
        buckets = [bucket for block in oracle.blocks for bucket in block.buckets]
        state["codes"] = [code for bucket in buckets for code in bucket.codes]
        state |= {name: [bucket.stored[name] for bucket in buckets] for name in buckets[0].stored}
    if oracle.blocks and s.window_size > 1:
        state |= {name: [] for name in ("indices", "values", *(["scales"] if s.packed_window else []))}
        for block in oracle.blocks:
            num_kept = s.num_kept(len(block.places))
            for slot in range(s.window_size):
                indices, values = zip(*block.slots.get(slot, [(0, 0.0)] * num_kept), strict=True)
                state["indices"] += indices
                state["values"] += block.codes_of.get(slot, [0] * num_kept) if s.packed_window else values
                if s.packed_window:
                    state["scales"].append(block.scale_of.get(slot, 0.0))
    if oracle.dense:
        places = [place for span in oracle.dense for place in span]
        state["exp_avg"] = [oracle.m[place] for place in places]
        state["exp_avg_sq"] = [oracle.v[place] for place in places]
    return {name: np.array(values, np.float32) for name, values in state.items()}


def _numbers(tensor: torch.Tensor, name: str, case: Case) -> np.ndarray:
    """A state tensor as numbers: codes and packed indices unpacked block by block."""
    if name == "indices":
        return _indices(tensor, case)
    if name == "values" and case.config.packed_window:
        return tensor.view(torch.int8).float().numpy()
    if name != "codes":
        return tensor.float().numpy()
    bits, numbers = case.config.ef_bits, []
    packed = iter(tensor.tolist())
    for span in case.layout.spans:
        if span.is_dense:
            continue
        for block in _block_lengths(case, span):
            numbers += _ternary_codes(packed, block) if bits == 1.6 else _codes(packed, block, bits)
    assert next(packed, None) is None
    return np.array(numbers, np.float32)


def _indices(tensor: torch.Tensor, case: Case) -> np.ndarray:
    if not case.config.packed_window:
        return tensor.view(torch.int16).float().numpy()
    numbers: list[int] = []
    stored = iter(tensor.tolist())
    for span in case.layout.spans:
        for numel in [] if span.is_dense else _block_lengths(case, span):
            for _ in range(case.config.window_size):
                num_bits = 12 * case.config.num_kept(numel)
                bits = sum(next(stored) << (8 * i) for i in range(-(-num_bits // 8)))
                numbers += [bits >> at & 4095 for at in range(0, num_bits, 12)]
                assert bits >> num_bits == 0
    assert next(stored, None) is None
    return np.array(numbers, np.float32)


def _block_lengths(case: Case, span: object) -> list[int]:
    oracle = ScalarMicroAdam([(span.global_shape, span.start, span.numel, 0)], case.config, "float32")  # type: ignore[attr-defined]
    return [len(block.places) for block in oracle.blocks]


def _codes(packed: Iterator[int], length: int, bits: int) -> list[int]:
    byte, codes = 0, []
    for i in range(length):
        if i % (8 // bits) == 0:
            byte = next(packed)
        codes.append(byte >> (i % (8 // bits) * bits) & (2**bits - 1))
    return codes


def _ternary_codes(packed: Iterator[int], length: int) -> list[int]:
    """Of 512 elements at a time five in a byte, which are as far apart as there are bytes: a multiple of 8."""
    codes = []
    for first in range(0, length, 512):
        members = min(512, length - first)
        num_bytes = next(n for n in range(8, 105, 8) if 5 * n >= members)
        group = [next(packed) for _ in range(num_bytes)]
        assert max(group) < 3**5
        codes += [group[i % num_bytes] // 3 ** (i // num_bytes) % 3 for i in range(members)]
    return codes
