"""The case table every backend is run on, and the code that runs one case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.backends.base import Backend, TensorStep
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import WINDOW_TENSORS, ShardSpan, StateLayout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normal(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """Gradients over several orders of magnitude."""
    scale = torch.randn(numel, generator=generator).mul(2).exp()
    return torch.randn(numel, generator=generator) * scale


def constant(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """All keys tie and every bucket has hi == lo in the first step."""
    return torch.full((numel,), 0.25)


def ties(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """Five different values: the k-th key is shared by hundreds of elements."""
    return torch.randint(-2, 3, (numel,), generator=generator).float()


def zeros(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """Nothing but zeros, negative ones among them."""
    return torch.where(torch.arange(numel) % 3 == 0, -0.0, 0.0)


def sparse_rows(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """An embedding: most stretches get no gradient."""
    alive = torch.arange(numel) // 97 % 31 == step % 31
    return torch.where(alive, torch.randn(numel, generator=generator), 0.0)


def recurring(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """The same coordinates are large in every step, so they come in every slot of the window."""
    return torch.randn(numel, generator=generator) * torch.where(torch.arange(numel) % 13 == 5, 30.0, 1.0)


def tiny(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """Subnormal numbers, and bucket ranges so small that 15 / range overflows."""
    return torch.randn(numel, generator=generator) * 1e-38


def shifted(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """A large common part: a bucket's range is a few bf16 numbers wide, and its rounded ends lie inside it."""
    return torch.randn(numel, generator=generator) * 0.3 + 100.0


def nonfinite(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """NaN, Inf, -Inf or a magnitude that is skipped, in every third step, at one place."""
    grad = torch.randn(numel, generator=generator)
    if step % 3 == 1 and numel:
        place = int(torch.randint(numel, (1,), generator=generator))
        grad[place] = (math.nan, math.inf, -math.inf, 1e19, 3e38, -(2.0**60))[step // 3 % 6]
    return grad


def below_limit(generator: torch.Generator, numel: int, step: int) -> Tensor:
    """Magnitudes just below the limit of what is skipped."""
    return torch.randn(numel, generator=generator).sign() * (2.0**60 - 2.0**52)


@dataclass(frozen=True)
class Case:
    """One run of a backend: parameter spans in one local tensor, dtypes, settings and gradients.

    Attributes:
        padding: Elements before, between and after the spans; they hold NaN and must not be read or written.
    """

    name: str
    spans: tuple[tuple[tuple[int, ...], int, int], ...]  # (global shape, start, numel)
    param_dtype: torch.dtype = FP32
    grad_dtype: torch.dtype = FP32
    settings: dict[str, Any] = field(default_factory=dict)
    gradient: Callable[[torch.Generator, int, int], Tensor] = normal
    num_steps: int = 6
    grad_scale: float = 1.0
    padding: int = 7

    def __str__(self) -> str:
        return self.name

    @property
    def config(self) -> MicroAdamConfig:
        return MicroAdamConfig(**{"lr": 1e-2, "block_size": 256, "density": 0.05, "window_size": 4, **self.settings})

    @property
    def layout(self) -> StateLayout:
        spans, offset = [], self.padding
        for i, (shape, start, numel) in enumerate(self.spans):
            spans.append(ShardSpan(str(i), shape, start, numel, offset))
            offset += numel + self.padding
        return StateLayout(tuple(spans), self.config)


def whole(*shape: int) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    return ((shape, 0, math.prod(shape)),)


def part(shape: tuple[int, ...], start: int, numel: int) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    return ((shape, start, numel),)


FLAT_SHARD = (((64, 300), 9000, 10200), ((300,), 7, 293), ((64, 80), 0, 5120), ((70,), 5, 0), ((64, 64), 0, 1000))


def _table() -> list[Case]:
    window1 = {"window_size": 1, "density": 0.1}
    paper = {"block_size": 4096, "window_size": 10, "density": 0.01}
    cases = [Case(f"{g.__name__}", whole(20, 256), gradient=g, num_steps=9) for g in GRADIENTS]
    cases += [Case(f"{g.__name__}-window1", whole(20, 256), gradient=g, settings=window1) for g in GRADIENTS]
    # dtypes of weights and gradients, with weight decay and a loss scale
    for p in (FP32, BF16, FP16):
        for g in (FP32, BF16, FP16, torch.float64):
            if g == torch.float64 and p != FP32:
                continue
            name = f"{str(p)[6:]}-{str(g)[6:]}"
            cases.append(Case(name, whole(17, 300), p, g, {"weight_decay": 0.1}, grad_scale=0.125))
    # lengths around a block, odd rows, short last blocks, rows that do not divide
    for row in (65, 71, 255, 256, 257, 263, 511, 1000, 1001):
        cases.append(Case(f"row-{row}", whole(64, row), BF16, BF16, {"weight_decay": 0.01}))
    cases += [
        Case("paper-default", whole(2, 4096), settings=paper, num_steps=12),
        Case("paper-default-odd", whole(3, 5003), BF16, BF16, paper, num_steps=12),
        Case("one-row", whole(1, 5000)),
        Case("conv", whole(32, 16, 3, 3), BF16, FP32),
        Case("dense-vector", whole(300), settings={"weight_decay": 0.1}),
        Case("dense-vector-nonfinite", whole(300), BF16, BF16, gradient=nonfinite, num_steps=9),
        Case("dense-small-matrix", whole(63, 65), FP16, FP16),
        Case("empty-span", part((64, 80), 640, 0)),
        Case("one-element", part((64, 80), 641, 1)),
        Case("fragments", part((64, 300), 333, 4001), settings={"weight_decay": 0.1}),
        Case("fragments-bf16", part((64, 1001), 517, 5555), BF16, BF16),
        Case("fragment-inside-a-block", part((64, 256), 259, 101), BF16, FP32),
        Case("flat-shard", FLAT_SHARD, settings={"weight_decay": 0.1}),
        Case("flat-shard-bf16", FLAT_SHARD, BF16, BF16, {"weight_decay": 0.1, "seed": 2**32 - 1}, num_steps=3),
        Case("all-kept", whole(20, 256), settings={"density": 1.0}),
        Case("half-kept", whole(20, 256), settings={"density": 0.5, "window_size": 3}),
        Case("most-kept", whole(20, 256), settings={"density": 0.7, "window_size": 6}, num_steps=8),
        Case("one-kept", whole(20, 256), settings={"density": 1e-6}),
        Case("one-kept-odd", whole(20, 250), settings={"density": 1e-6}, gradient=shifted),
        Case("long-window", whole(20, 256), settings={"window_size": 20}, num_steps=25),
        Case("bucket-of-a-block", whole(20, 256), settings={"bucket_size": 256}),
        Case("bucket-over-a-block", whole(20, 250), settings={"bucket_size": 1024}),
        Case("bucket-2", whole(20, 256), settings={"bucket_size": 2}),
        Case("bucket-odd-fit", whole(20, 256), settings={"bucket_size": 22}),
        Case("betas-zero", whole(20, 256), settings={"betas": (0.0, 0.0)}),
        Case("lr-zero", whole(20, 256), settings={"lr": 0.0, "weight_decay": 0.1}),
    ]
    decayed = {"weight_decay": 0.1, "seed": 7}
    cases += [Case(f"{g.__name__}-bf16", whole(20, 256), BF16, gradient=g, settings=decayed) for g in GRADIENTS]
    packed = {"packed_window": True}
    cases += [Case(f"{g.__name__}-packed", whole(20, 256), gradient=g, num_steps=9, settings=packed) for g in GRADIENTS]
    cases += [
        Case("packed-odd", whole(3, 5003), BF16, BF16, {**paper, **packed}, num_steps=12),
        Case("packed-fragments", part((64, 1001), 517, 5555), FP16, FP32, {**packed, "weight_decay": 0.1}),
        Case("packed-one-kept", whole(20, 256), settings={**packed, "density": 1e-6, "window_size": 2}),
        Case("packed-all-kept", whole(20, 250), settings={**packed, "density": 1.0, "window_size": 20}, num_steps=25),
    ]
    for bits in (0, 1, 1.6, 2, 8):
        settings, one = {"ef_bits": bits}, {**window1, "ef_bits": bits}
        cases += [
            *(
                Case(f"ef{bits}-{g.__name__}", whole(16, 256), gradient=g, settings=one, num_steps=4)
                for g in (ties, zeros, sparse_rows, tiny, shifted, nonfinite)
            ),
            Case(f"ef{bits}-window", whole(16, 256), settings=settings),
            Case(f"ef{bits}-fragments", part((64, 301), 333, 4001), BF16, BF16, settings),
            Case(f"ef{bits}-row-1001", whole(8, 1001), BF16, FP32, {**settings, "block_size": 1024, "seed": 3}),
            Case(f"ef{bits}-bucket-22", whole(20, 256), FP16, FP16, {**one, "bucket_size": 22}),
            Case(f"ef{bits}-bucket-of-a-block", whole(20, 250), settings={**one, "bucket_size": 1024}),
        ]
        if bits:
            cases.append(Case(f"ef{bits}-packed", part((64, 301), 333, 4001), settings={**packed, **settings}))
    # Where it is not said, bf16 weights are rounded stochastically.
    to_nearest = {"bfloat16-bfloat16", "nonfinite-bf16", "tiny-bf16", "row-257", "dense-vector-nonfinite"}
    cases += [
        replace(case, name=f"{case.name}-nearest", settings={**case.settings, "rounding": "nearest"})
        for case in cases
        if case.name in to_nearest | {"ef1.6-fragments"}
    ]
    return cases


GRADIENTS = (normal, constant, ties, zeros, sparse_rows, recurring, tiny, shifted, nonfinite, below_limit)
CASES = _table()

# Lengths and settings that the fused kernels treat in their own ways: whole and partial tiles and vectors, groups that
# are merged or too few for the number kept, buckets of one tile, several and no whole number of them.
_LONG = {"block_size": 4096, "weight_decay": 0.1}
_PACKED = {**_LONG, "density": 0.01, "packed_window": True}
KERNEL_CASES = [
    *CASES,
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
    Case("4096-20%-3", whole(3, 8192), BF16, BF16, settings={**_LONG, "density": 0.2, "window_size": 3}),
    Case("4096-sparse", whole(3, 8192), settings={**_LONG, "density": 0.05}, gradient=sparse_rows),
    Case("8192", whole(2, 8192), BF16, BF16, settings={"block_size": 8192, "density": 0.05, "window_size": 2}),
    Case("15000", whole(2, 15000), settings={"block_size": 16384, "density": 0.01, "window_size": 10}, num_steps=3),
    Case("4096-1%-10-packed", whole(3, 8192), BF16, BF16, {**_PACKED, "window_size": 10}, num_steps=12),
    Case("4096-5%-2-packed", whole(3, 8192), settings={**_PACKED, "density": 0.05, "window_size": 2}),
    Case("4096-all-kept-packed", whole(2, 4096), settings={**_PACKED, "density": 1.0, "window_size": 2}, num_steps=3),
    Case("one-kept-of-64", whole(64, 64), settings={"block_size": 64, "density": 1e-6, "window_size": 20}),
    Case("bucket-4", whole(20, 250), settings={"bucket_size": 4}),
    Case("bucket-6", whole(20, 250), FP16, BF16, settings={"bucket_size": 6}),
    Case("bucket-8", whole(20, 250), settings={"bucket_size": 8}),
    Case("bucket-16", whole(20, 256), BF16, BF16, settings={"bucket_size": 16}),
    *(
        case
        for bits in (0, 1, 1.6, 2, 8)
        for case in (
            Case(f"4096-ef{bits}-10%-1", whole(3, 8192), BF16, BF16, {**_LONG, "window_size": 1, "ef_bits": bits}),
            Case(f"4096-ef{bits}-1%-10", whole(3, 8192), settings={**_LONG, "density": 0.01, "ef_bits": bits}),
            Case(f"2752-ef{bits}", whole(2, 11008), BF16, FP32, {**_LONG, "bucket_size": 128, "ef_bits": bits}),
            Case(f"32767-ef{bits}", whole(2, 32767), settings={"block_size": 32768, "ef_bits": bits}, num_steps=3),
            Case(f"bucket-32-ef{bits}", whole(3, 4099), settings={**_LONG, "bucket_size": 32, "ef_bits": bits}),
        )
    ),
]


@dataclass
class Snapshot:
    """What a backend left behind after a step."""

    param: Tensor
    state: dict[str, Tensor]
    num_nonfinite: int


def make_inputs(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The local tensor and one gradient a step; everything outside the spans is NaN."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
    spans = case.layout.spans
    local_numel = spans[-1].offset + spans[-1].numel + case.padding
    param = torch.full((local_numel,), math.nan, dtype=case.param_dtype)
    for span in spans:
        param[span.offset : span.offset + span.numel] = torch.randn(span.numel, generator=generator).to(
            case.param_dtype
        )
    grads = []
    for step in range(case.num_steps):
        grad = torch.full((local_numel,), math.nan, dtype=case.grad_dtype)
        for span in spans:
            values = case.gradient(generator, span.numel, step)
            grad[span.offset : span.offset + span.numel] = values.to(case.grad_dtype)
        grads.append(grad)
    return param, grads


def run_case(case: Case, backend: Backend, device: str = "cpu") -> list[Snapshot]:
    """Run all steps of a case and snapshot parameter and state after each, in host memory."""
    inputs, grads = make_inputs(case)
    param = inputs.to(device)
    layout = case.layout
    state = allocate_state(layout, param.device)
    snapshots = []
    for step, before in enumerate(grads):
        grad = before.to(device, copy=True)
        tensor = TensorStep(param, grad, state, layout, step)
        num_nonfinite = backend.step([tensor], case.config, case.grad_scale)
        assert torch.equal(grad.cpu().view(torch.uint8), before.view(torch.uint8)), "the gradient was overwritten"
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
        snapshots.append(Snapshot(param.to("cpu", copy=True), copies, int(num_nonfinite)))
    return snapshots


def replay_case(case: Case, backend: Backend) -> None:
    """Another rank's weights, updated from its window alone, are the same bits; a skipped step is not replayed."""
    param, grads = make_inputs(case)
    replica = param.clone()
    layout = case.layout
    state = allocate_state(layout, param.device)
    window = {name: state[name] for name in WINDOW_TENSORS if name in state}  # of the rank that has the gradient
    for step, grad in enumerate(grads):
        num_nonfinite = backend.step([TensorStep(param, grad, state, layout, step)], case.config, case.grad_scale)
        if num_nonfinite:
            replica.copy_(param)
            continue
        before = {name: tensor.clone() for name, tensor in window.items()}
        assert backend.step([TensorStep(replica, None, window, layout, step)], case.config, case.grad_scale) == 0
        assert all(torch.equal(window[name].view(torch.uint8), before[name].view(torch.uint8)) for name in window)
        for run in layout.dense_runs:  # has no window; travels as it is
            replica[run.start : run.start + run.numel] = param[run.start : run.start + run.numel]
        assert torch.equal(replica.view(torch.uint8), param.view(torch.uint8)), f"step {step}"


def is_replayed(case: Case) -> bool:
    return case.config.window_size > 1 and "indices" in case.layout.tensors
