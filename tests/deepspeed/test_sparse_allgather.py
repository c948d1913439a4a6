"""`sparse_allgather`: the same bits on every rank as DeepSpeed's gather, in a fraction of its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from microadam_dist import ConfigError, MicroAdam
from microadam_dist.engines import deepspeed_sparse
from microadam_dist.engines.deepspeed_sparse import apply_, encode
from tests.deepspeed.engines import (
    SETTINGS,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.ranks import run_ranks

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """`torch.equal` takes 0 and -0 for equal, and no NaN for itself."""
    return torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("numel", [0, 1, 2, 5, 1000, 40001])
def test_message_gives_the_new_weights(dtype: torch.dtype, share: float, size: float, numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    old = torch.randn(numel, generator=generator).to(dtype)
    change = size * torch.randn(numel, generator=generator) * (torch.rand(numel, generator=generator) < share)
    new = (old.float() + change).to(dtype)
    payload, counts = encode(old, new)
    assert payload.dtype == torch.uint8 and len(payload) == counts.num_bytes(new.element_size())
    assert counts.changed == int((old.view(BITS[dtype]) != new.view(BITS[dtype])).sum())
    apply_(old, payload, counts)
    assert same_bits(old, new)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_message_carries_every_bit_pattern(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    old, new = (side.flatten().to(dtype) for side in torch.meshgrid(numbers, numbers, indexing="ij"))
    # and differences around the limits of the narrow ones
    width = new.element_size()
    limit = 1 << (8 * width - 9)
    deltas = torch.tensor([0, 1, -1, limit - 1, limit, limit + 1, 1 - limit, -limit, -limit - 1], dtype=BITS[dtype])
    old = torch.cat((old, torch.ones(len(deltas) + 400, dtype=dtype)))
    new = torch.cat((new, (torch.ones(len(deltas), dtype=dtype).view(BITS[dtype]) + deltas).view(dtype)))
    new = torch.cat((new, torch.full((400,), 1.0078125, dtype=dtype)))
    payload, counts = encode(old, new)
    assert 0 < counts.wide < counts.changed
    apply_(old, payload, counts)
    assert same_bits(old, new)


@pytest.mark.parametrize("gap", [*range(13, 18), *range(28, 33), 1000])
def test_long_gaps(gap: int) -> None:
    old, new = torch.zeros(2 * gap + 3), torch.zeros(2 * gap + 3)
    new[[gap, 2 * gap + 1]] = 1.0
    payload, counts = encode(old, new)
    assert counts == (-(-2 * (gap // 15 + 1) // 2), 2, 2)
    apply_(old, payload, counts)
    assert torch.equal(old, new)


# ---------------------------------------------------------------- engines


class Student(nn.Module):
    """A real little network whose rows keep exactly 1 %; the norm and the biases take the dense path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2000, 100)
        self.norm = nn.LayerNorm(100)
        self.last = nn.Linear(100, 200)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs = self.last(nn.functional.gelu(self.norm(self.first(inputs))))
        return nn.functional.mse_loss(outputs.float(), targets.float())

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups, each with a matrix and vectors; the second one without decay and slower."""
        return [
            {"params": [*self.first.parameters()], "weight_decay": weight_decay},
            {"params": [*self.norm.parameters(), *self.last.parameters()], "weight_decay": 0.0, "lr": 5e-4},
        ]


def batches(rank: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    teacher = torch.randn(2000, 200, generator=torch.Generator().manual_seed(99)) / 2000**0.5
    while True:
        inputs = torch.randn(16, 2000, generator=generator)
        yield inputs.to(dtype), (inputs @ teacher).relu().to(dtype)


def new_student(stage: int, dtype: torch.dtype, weight_decay: float, sparse: bool, **extra: Any) -> Any:
    model = Student()
    params = {"lr": 1e-3, "window_size": 10, "density": 0.01, "sparse_allgather": sparse}
    config = make_config(stage, dtype, params, **extra)
    return initialize(model, config, model_parameters=model.groups(weight_decay))


def step(engine: Any, batch: tuple[Tensor, Tensor]) -> None:
    engine.backward(engine(*batch))
    engine.step()


def flats(engine: Any) -> list[Tensor]:
    return [flat.clone() for flat in engine.optimizer.bit16_groups_flat]


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Bytes that enter any collective of the kind both gathers use, as torch sees them."""
    import deepspeed.comm as ds

    sent = [0]
    backend = ds.comm.cdb
    original = backend.all_gather_into_tensor

    def counting(output_tensor: Tensor, input_tensor: Tensor, **kwargs: Any) -> Any:
        sent[0] += input_tensor.nbytes
        return original(output_tensor=output_tensor, input_tensor=input_tensor, **kwargs)

    backend.all_gather_into_tensor = counting
    try:
        yield sent
    finally:
        del backend.all_gather_into_tensor


NUM_STEPS = 200
CASES = [
    (stage, dtype, weight_decay)
    for (stage, dtype), weight_decay in itertools.product(((1, "float32"), (2, "bfloat16")), (0.0, 0.1))
]


def _train_twins(rank: int, world_size: int, cases: list[tuple[int, str, float]]) -> list[Any]:
    results = []
    for stage, dtype_name, weight_decay in cases:
        dtype = getattr(torch, dtype_name)
        dense, sparse = (new_student(stage, dtype, weight_decay, sparse) for sparse in (False, True))
        numel = sum(flat.numel() for flat in sparse.optimizer.bit16_groups_flat)
        data = batches(rank, dtype)
        for index in range(NUM_STEPS):
            batch = next(data)
            step(dense, batch)
            with counted_collectives() as sent:
                step(sparse, batch)
            for ours, theirs in zip(flats(sparse), flats(dense), strict=True):
                assert same_bits(ours, theirs), f"step {index}, rank {rank}"
            if index == 49:  # the window is full
                before = base_optimizer(sparse).exchanged_bytes.sent
                tapped = 0
            elif index > 49:
                tapped += sent[0]
        for ours, theirs in zip(
            sparse.optimizer.single_partition_of_fp32_groups,
            dense.optimizer.single_partition_of_fp32_groups,
            strict=True,
        ):
            assert same_bits(ours.detach(), theirs.detach())
        counted = base_optimizer(sparse).exchanged_bytes
        assert tapped == counted.sent - before
        assert counted.dense == NUM_STEPS * numel // world_size * dtype.itemsize
        assert base_optimizer(dense).exchanged_bytes.sent == 0
        results.append(tapped * world_size / numel / (NUM_STEPS - 50))
        dense.destroy()
        sparse.destroy()
    return results


@pytest.mark.deepspeed
@pytest.mark.parametrize(("world_size", "cases"), [(2, CASES), (4, [CASES[1], CASES[3]])], ids=["2", "4"])
def test_weights_are_those_of_the_dense_gather_in_a_fraction_of_the_bytes(
    world_size: int, cases: list[tuple[int, str, float]]
) -> None:
    per_rank = run_ranks(_train_twins, world_size, cases)
    for index, (stage, dtype, weight_decay) in enumerate(cases):
        # Padded to the longest message, so every rank sends as much.
        assert len({results[index] for results in per_rank}) == 1
        bytes_a_weight = per_rank[0][index]
        dense_bytes = getattr(torch, dtype).itemsize
        print(
            f"ZeRO-{stage} {dtype}, weight decay {weight_decay}, {world_size} ranks: "
            f"{bytes_a_weight:.3f} bytes a parameter and step, dense gather {dense_bytes}"
        )
        assert bytes_a_weight <= 0.45
