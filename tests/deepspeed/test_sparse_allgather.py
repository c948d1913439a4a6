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
from microadam_dist.engines import changes
from microadam_dist.engines.changes import apply_, encode
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
        self.first = nn.Linear(1000, 100)
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
    teacher = torch.randn(1000, 200, generator=torch.Generator().manual_seed(99)) / 1000**0.5
    while True:
        inputs = torch.randn(16, 1000, generator=generator)
        yield inputs.to(dtype), (inputs @ teacher).relu().to(dtype)


def new_student(stage: int, dtype: torch.dtype, weight_decay: float, sparse: bool, **extra: Any) -> Any:
    model = Student()
    params = {"lr": 1e-3, "window_size": 10, "density": 0.01, "sparse_allgather": sparse}
    config = make_config(stage, dtype, params, **extra)
    return initialize(model, config, model_parameters=model.groups(weight_decay))


def step(engine: Any, batch: tuple[Tensor, Tensor]) -> None:
    engine.backward(engine(*(tensor.to(engine.device) for tensor in batch)))
    engine.step()


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


WARM_UP, NUM_STEPS = 15, 40  # the window of 10 is full before the bytes are counted
CASES = [
    (stage, dtype, weight_decay)
    for (stage, dtype), weight_decay in itertools.product(((1, "float32"), (2, "bfloat16")), (0.0, 0.1))
]


def assert_gathered(engine: Any) -> None:
    """Every rank's weights are those DeepSpeed's own gather makes of all master weights."""
    zero = engine.optimizer
    for flat, master in zip(zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True):
        expected = torch.empty_like(flat)
        dist.all_gather_into_tensor(expected, master.detach().to(flat))
        assert same_bits(flat, expected)


def _train(rank: int, world_size: int, cases: list[tuple[int, str, float]]) -> list[float]:
    results = []
    for stage, dtype_name, weight_decay in cases:
        dtype = getattr(torch, dtype_name)
        engine = new_student(stage, dtype, weight_decay, sparse=True)
        numel = sum(flat.numel() for flat in engine.optimizer.bit16_groups_flat)
        exchanged = base_optimizer(engine).exchanged_bytes
        tapped = before = 0
        for index, batch in enumerate(itertools.islice(batches(rank, dtype), NUM_STEPS)):
            if index == WARM_UP:
                before = exchanged.sent
            with counted_collectives() as sent:
                step(engine, batch)
            tapped += sent[0] if index >= WARM_UP else 0
            assert_gathered(engine)
        assert exchanged.sent - before == tapped
        assert exchanged.dense == NUM_STEPS * numel // world_size * dtype.itemsize
        results.append(tapped * world_size / numel / (NUM_STEPS - WARM_UP))
        engine.destroy()
    return results


@pytest.mark.deepspeed
@pytest.mark.parametrize(("world_size", "cases"), [(2, CASES), (4, [CASES[1], CASES[3]])], ids=["2 ranks", "4 ranks"])
def test_every_step_is_that_of_the_dense_gather_in_a_fraction_of_the_bytes(
    world_size: int, cases: list[tuple[int, str, float]]
) -> None:
    per_rank = run_ranks(_train, world_size, cases)
    for index, (stage, dtype, weight_decay) in enumerate(cases):
        # Messages are padded to the longest, so every rank sends as much.
        assert len({results[index] for results in per_rank}) == 1
        bytes_a_weight = per_rank[0][index]
        print(
            f"ZeRO-{stage} {dtype}, weight decay {weight_decay}, {world_size} ranks: {bytes_a_weight:.3f} bytes a "
            f"parameter and step, dense gather {getattr(torch, dtype).itemsize}"
        )
        assert bytes_a_weight <= 0.45


# Settings that change every weight a lot, or where the weights and masters lie; compared with an engine without the
# option.
MASTER_FREE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
VARIANTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "float32", {"zero_optimization": {"round_robin_gradients": True}}),
    (1, "bfloat16", {"gradient_accumulation_steps": 2, "gradient_clipping": 0.1}),
    (2, "bfloat16", {"bf16": MASTER_FREE}),
    (1, "bfloat16", {"bf16": MASTER_FREE, "zero_optimization": {"round_robin_gradients": True}}),
    (2, "bfloat16", {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
]


def _train_variants(rank: int, world_size: int) -> list[tuple[int, int]]:
    import deepspeed.runtime.utils
    import deepspeed.runtime.zero.stage_1_and_2 as stage_1_and_2

    results = []
    changes.PIECE_NUMEL = 10001
    for stage, dtype_name, extra in VARIANTS:
        dtype = getattr(torch, dtype_name)
        dense, sparse = (
            initialize(make_model(), make_config(stage, dtype, {**SETTINGS, "sparse_allgather": on}, **extra))
            for on in (False, True)
        )
        for engine in (sparse, dense):  # one after the other: neither disturbs the other
            train(engine, make_gradients(20, dtype))
        dense_weights, sparse_weights = full_weights(dense), full_weights(sparse)
        assert all(same_bits(sparse_weights[name], dense_weights[name]) for name in dense_weights)
        assert_gathered(sparse)
        assert base_optimizer(dense).exchanged_bytes.sent == 0
        exchanged = base_optimizer(sparse).exchanged_bytes
        results.append((exchanged.sent, exchanged.dense))
        dense.destroy()
        sparse.destroy()
    assert stage_1_and_2.all_gather_dp_groups is deepspeed.runtime.utils.all_gather_dp_groups
    return results


@pytest.mark.deepspeed
def test_same_weights_as_an_engine_without_it() -> None:
    for sent, dense in run_ranks(_train_variants, 2)[0]:
        print(f"sent {sent} bytes, dense {dense}")
        assert 0 < sent < 0.7 * dense


# ---------------------------------------------------------------- when it is not used


def _dense_steps(rank: int, world_size: int, folder: str) -> None:
    """Which steps gather densely: those after the weights were written to, and those that would send more."""
    config = make_config(2, torch.float32, {**SETTINGS, "density": 0.01, "sparse_allgather": True})
    model = make_model()
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == is_matrix]} for is_matrix in (True, False)]
    engine = initialize(model, config, model_parameters=groups)
    gradients = iter(make_gradients(30))
    exchanged = base_optimizer(engine).exchanged_bytes
    matrices = engine.optimizer.single_partition_of_fp32_groups[0]

    def is_dense() -> bool:
        before = exchanged.sent
        train(engine, [next(gradients)])
        assert_gathered(engine)
        return exchanged.sent - before >= matrices.nbytes

    assert [is_dense() for _ in range(4)] == [True, False, False, False]

    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    assert [is_dense() for _ in range(3)] == [True, False, False]

    engine.optimizer.update_lp_params()
    assert [is_dense() for _ in range(2)] == [False, False]

    if rank == 1:  # one rank alone has other weights; the gather makes them equal again, as DeepSpeed's would
        with torch.no_grad():
            engine.module.embed.weight.mul_(2)
    assert [is_dense() for _ in range(3)] == [True, False, False]

    # A step that fails between the update and the exchange, when every rank has written its own weights already.
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no network")

    exchange = engine.optimizer._optimizer_step.__self__
    exchange._all_gather = fail
    with pytest.raises(RuntimeError, match="no network"):
        train(engine, [next(gradients)])
    del exchange._all_gather
    assert [is_dense() for _ in range(3)] == [True, False, False]

    # Other weights in the master copy alone: nearly all change at once.
    matrices.data.mul_(-3)
    assert [is_dense() for _ in range(3)] == [True, False, False]


@pytest.mark.deepspeed
def test_dense_gather_where_it_is_needed(tmp_path: Any) -> None:
    run_ranks(_dense_steps, 2, str(tmp_path))


def _refusals(rank: int, world_size: int) -> list[str]:
    settings = {**SETTINGS, "sparse_allgather": True}
    messages = []
    for stage, dtype, extra in (
        (0, torch.float32, {}),
        (3, torch.bfloat16, {}),
        (1, torch.bfloat16, {"data_types": {"grad_accum_dtype": "fp32"}}),
    ):
        with pytest.raises(ConfigError) as error:
            initialize(make_model(), make_config(stage, dtype, settings, **extra))
        messages.append(str(error.value))
    return messages


@pytest.mark.deepspeed
def test_refused_at_initialize_where_it_cannot_work() -> None:
    stage0, stage3, bf16_optimizer = run_ranks(_refusals, 1)[0]
    for message in (stage0, stage3, bf16_optimizer):
        assert "sparse_allgather" in message and "emove" in message
    assert "zero_optimization.stage is 0" in stage0 and "zero_optimization.stage is 3" in stage3
    assert "BF16_Optimizer" in bf16_optimizer and "grad_accum_dtype" in bf16_optimizer


def _unknown_deepspeed(rank: int, world_size: int) -> None:
    import deepspeed

    deepspeed.__version__ = "0.25.1"
    settings = {**SETTINGS, "sparse_allgather": True}
    with pytest.warns(UserWarning, match=r"not known to work with DeepSpeed 0\.25\.1.*all weights are gathered"):
        engine = initialize(make_model(), make_config(2, torch.float32, settings))
    assert "step" not in vars(engine.optimizer)
    train(engine, make_gradients(3))
    assert_gathered(engine)


@pytest.mark.deepspeed
def test_unknown_deepspeed_gathers_densely_with_a_warning() -> None:
    run_ranks(_unknown_deepspeed, 2)


@pytest.mark.parametrize("value", ["true", 1, None])
def test_must_be_a_bool(value: Any) -> None:
    with pytest.raises(ConfigError, match="sparse_allgather=.*expected true or false"):
        MicroAdam([nn.Parameter(torch.zeros(4))], sparse_allgather=value)
