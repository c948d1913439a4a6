"""A fused backend against the reference backend: every bit of parameters and state, after each step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.backends.base import Backend, CapturableBackend, DeviceInputs, TensorStep
from microadam_dist.backends.reference import ReferenceBackend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import ShardSpan, StateLayout

from .cases import BF16, FP16, FP32, Case, Snapshot, run_case

_references: dict[str, list[Snapshot]] = {}


def reference(case: Case) -> list[Snapshot]:
    key = repr(case)  # all of it; its settings have no hash
    if key not in _references:
        _references[key] = run_case(case, ReferenceBackend())
    return _references[key]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that any NaN equals any NaN."""
    numbers = torch.where(a.isnan(), 0, a), torch.where(b.isnan(), 0, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(*(x.view(torch.uint8) for x in numbers))


def assert_same_bits(case: Case, backend: Backend, device: str = "cpu") -> None:
    """Run a case on ``device`` and compare it with the reference backend on the CPU."""
    for step, (expected, actual) in enumerate(zip(reference(case), run_case(case, backend, device), strict=True)):
        assert actual.num_nonfinite == expected.num_nonfinite, f"step {step}"
        assert same_bits(actual.param, expected.param), f"param, step {step}"
        for name, tensor in expected.state.items():
            assert same_bits(actual.state[name], tensor), f"{name}, step {step}"


def assert_same_every_16_bit_weight(
    backend: Backend,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    decay: float,
    device: str = "cpu",
    rounding: str = "auto",
) -> None:
    """All 2**16 weights and gradients, NaN and subnormal ones among them.

    A kernel may leave weights alone that decay cannot change, which depends on 1 - lr * weight_decay.
    """
    config = MicroAdamConfig(lr=2.0**-7, weight_decay=decay * 2.0**7, block_size=64, rounding=rounding)
    layout = StateLayout((ShardSpan("all", shape, 0, 2**16),), config)
    weights = torch.arange(2**16, dtype=torch.int32).short().view(dtype)
    results = []
    for run, place in ((ReferenceBackend(), "cpu"), (backend, device)):
        param = weights.to(place, copy=True)
        state = allocate_state(layout, param.device)
        for step, grad in enumerate((weights.flip(0), torch.zeros_like(weights))):
            run.step([TensorStep(param, grad.to(place), state, layout, step)], config, 2.0**-20)
        results.append([param, *state.values()])
    assert all(same_bits(expected, actual.cpu()) for expected, actual in zip(*results, strict=True))


def _train_many_tensors(backend: Backend, num_calls: int, one_by_one: bool, device: str) -> list[Tensor]:
    config = MicroAdamConfig(lr=1e-2, block_size=256, window_size=3)
    generator = torch.Generator().manual_seed(0)
    tensors: list[TensorStep] = []
    for i in range(40):
        shape = ((i + 1, 300), (i + 7,), (70, 64 + i))[i % 3]
        layout = StateLayout((ShardSpan(str(i), shape, 0, math.prod(shape)),), config)
        param = torch.randn(math.prod(shape), generator=generator).to((FP32, BF16, FP16)[i % 3]).to(device)
        state = allocate_state(layout, param.device)
        tensors.append(TensorStep(param, param, state, layout, 0, counter=torch.tensor(i)))
    for call in range(num_calls):
        now = []
        for i, t in enumerate(tensors):
            grad = torch.randn(t.param.shape, generator=generator).to(device)
            assert t.counter == call + i  # more different steps than a backend's cache of scalars may hold
            now.append(t._replace(grad=grad, step=call + i))
        for members in [[t] for t in now] if one_by_one else [now]:
            backend.step(members, config, 1.0)
    return [tensor.cpu() for t in tensors for tensor in (t.param, *t.state.values())]


def assert_same_for_many_tensors(backend: Backend, device: str = "cpu") -> None:
    """One call for tensors of several dtypes, shapes and steps, against one call for each of them."""
    expected = _train_many_tensors(ReferenceBackend(), num_calls=4, one_by_one=True, device="cpu")
    actual = _train_many_tensors(backend, num_calls=4, one_by_one=False, device=device)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


def assert_same_with_numbers_on_the_device(
    backend: CapturableBackend,
    lr_dtype: torch.dtype | None,
    num_rows: int = 40,
    num_calls: int = 9,
    param_dtype: torch.dtype = FP32,
) -> None:
    """Steps with everything read where the tensors lie, one of them skipped, against the same numbers from the host."""
    settings = MicroAdamConfig(weight_decay=0.1, window_size=3, block_size=256, seed=5)
    spans = ShardSpan("a", (num_rows, 300), 0, num_rows * 300), ShardSpan("b", (50,), 0, 50)
    layouts = [StateLayout((span,), settings) for span in spans]
    params = [torch.randn(span.numel).to(param_dtype) for span in spans]
    twins = [param.clone() for param in params]
    states = [[allocate_state(layout, params[0].device) for layout in layouts] for _ in range(2)]
    counters = [torch.tensor(0), torch.tensor(7)]
    steps = [0, 7]
    for call in range(num_calls):
        grads = [torch.randn_like(param) for param in params]
        lr = torch.tensor(1e-2 / (call + 1), dtype=lr_dtype or torch.float64)
        config = replace(settings, lr=float(lr))
        is_skipped = call == num_calls // 2
        found_inf, scale = torch.tensor(float(is_skipped)), torch.tensor(3.0 + call)
        if not is_skipped:
            for tensor in zip(twins, grads, states[0], layouts, steps, strict=True):
                ReferenceBackend().step([TensorStep(*tensor)], config, 1.0 / float(scale))
            steps = [step + 1 for step in steps]
        inputs = DeviceInputs(None if lr_dtype is None else lr, scale, found_inf)
        given = config if lr_dtype is None else replace(config, lr=0.5)
        rows = zip(params, grads, states[1], layouts, counters, strict=True)
        backend.step_on_device([TensorStep(*row[:4], step=0, counter=row[4]) for row in rows], given, inputs)
        assert [int(counter) for counter in counters] == steps
        assert all(map(same_bits, params, twins))
        for expected, actual in zip(*states, strict=True):
            assert all(same_bits(actual[name], tensor) for name, tensor in expected.items())
