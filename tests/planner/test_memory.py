"""The planner's arithmetic: by hand for one small model, and laws that hold for all."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microadam_dist import ConfigError, MicroAdamConfig
from microadam_dist.config import SUPPORTED_EF_BITS
from microadam_dist.planner.activations import Activations, activations
from microadam_dist.planner.engines import Dtype, Engine, Precision, rank_shards
from microadam_dist.planner.gpus import CONTEXT_BYTES, GIB, GPUS, needed_bytes, smallest_gpu
from microadam_dist.planner.memory import Job, Optimizer, make_plan, state_bytes
from microadam_dist.planner.shapes import LlamaShape, Shapes, numel
from tests.amount import amount
from tests.planner.rank_memory import rank_memory

SHAPE = LlamaShape(hidden=64, intermediate=128, num_layers=1, vocab=100, num_heads=2, num_kv_heads=1, head_dim=32)
CONFIG = MicroAdamConfig(window_size=2, density=0.05, block_size=64, bucket_size=32)

# 2 x 6400 (embedding, output), 2 x 4096 (q, o), 2 x 2048 (k, v), 3 x 8192 (MLP), 3 x 64 (norms).
NUMEL = 49856
# 712 blocks of 64: 32 bytes of codes, 2 buckets x 4 bytes, 2 slots x 4 kept x 4 bytes. k, v, norms: two fp32 moments.
MICROADAM = 712 * (32 + 8 + 32) + 8 * (2 * 2048 + 192)


def test_by_hand_single() -> None:
    job = Job(dtype=Dtype.pure_bf16, batch=2, seq=8, config=CONFIG)
    plans = make_plan(SHAPE, job)
    plan = plans[Optimizer.microadam]
    assert (plan.weights, plan.master, plan.optimizer_state) == (2 * NUMEL, 0, MICROADAM)
    assert plans[Optimizer.adamw].optimizer_state == 4 * NUMEL
    # 8 bits per moment and 4 bytes for 256 of them; k, v and the norms are too small for it.
    blocks = 2 * 25 + 2 * 16 + 3 * 32
    assert plans[Optimizer.adamw_8bit].optimizer_state == 2 * (45568 + 4 * blocks) + 8 * (2 * 2048 + 192)
    assert (plan.gradients, plan.step_gradients, plan.buffers, plan.step_buffers) == (2 * NUMEL, 2 * NUMEL, 0, 0)
    # A token: layer 2 x 388 norms, 256 their outputs, 392 attention, 1024 MLP; last norm 388, its output 128.
    assert plan.activations == 16 * (2448 + 388 + 128) + 1024  # cos and sin: 2 x 32 x 8 x 2
    assert (plan.logits, plan.working) == (16 * 100 * 14, 0)
    assert plan.total == 2 * NUMEL + MICROADAM + 2 * NUMEL + plan.activations + plan.logits

    released = make_plan(SHAPE, dataclasses.replace(job, gradient_release=True))[Optimizer.microadam]
    assert released.gradients == 2 * 8192


def test_by_hand_activation_checkpointing() -> None:
    got = activations(SHAPE, batch=2, seq=8, compute_bytes=2, autocast=False, checkpointing=True)
    saved = 16 * (128 + 388 + 128) + 1024
    logits = 16 * 100 * 14
    assert got == Activations(saved, logits, working=16 * (200 + 2448 + 2 * (256 + 64) - 388 - 128) - logits)


def test_chunked_loss_has_the_logits_of_one_chunk() -> None:
    kwargs = {"batch": 1, "seq": 512, "compute_bytes": 2, "autocast": False, "checkpointing": True}
    whole, chunked = (activations(SHAPE, **kwargs, loss_chunk=chunk) for chunk in (None, 64))
    assert whole.logits == 512 * 14 * 100
    assert chunked.logits == 64 * 14 * 100 + 512 * 2 * 64  # and the gradient of the hidden states
    assert chunked.saved == whole.saved and chunked.total < whole.total


def test_by_hand_ranks() -> None:
    job = Job(engine=Engine.fsdp2, gpus=3, dtype=Dtype.pure_bf16, config=CONFIG)
    # Rows of the first rank: 34 of 100, 22 of 64, 11 of 32, 43 of 128.
    held = 2 * 34 * 64 + 2 * 22 * 64 + 2 * 11 * 64 + 2 * 43 * 64 + 22 * 128 + 3 * 22
    plans = make_plan(SHAPE, job)
    assert plans[Optimizer.microadam].weights == 2 * held
    assert plans[Optimizer.adamw].optimizer_state == 4 * held
    blocks = 2 * 34 + 2 * 22 + 2 * 43 + 2 * 22
    assert plans[Optimizer.microadam].optimizer_state == blocks * 72 + 8 * (2 * 11 * 64 + 3 * 22)

    zero = make_plan(SHAPE, Job(engine=Engine.zero2, gpus=3, config=CONFIG))[Optimizer.adamw]
    share = 16620  # 49856 / 3, rounded up to even numbers
    assert (zero.weights, zero.master, zero.optimizer_state) == (2 * 3 * share, 4 * share, 8 * share)
    assert zero.step_gradients == (2 + 2 + 4) * share

    offloaded = make_plan(SHAPE, Job(engine=Engine.zero2, gpus=3, config=CONFIG, offload_optimizer=True))
    plan = offloaded[Optimizer.adamw]
    assert (plan.weights, plan.master, plan.optimizer_state, plan.step) == (2 * 3 * share, 0, 0, 0)
    assert plan.host == (4 + 4 + 8) * share


shapes = st.lists(
    st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 300))), min_size=1, max_size=4
)


@settings(max_examples=amount(600), deadline=None)
@given(shapes, st.integers(1, 6), st.sampled_from(SUPPORTED_EF_BITS), st.sampled_from([1, 3]))
def test_state_of_row_shards_sums_to_the_whole(
    sizes: list[tuple[int, ...]], world_size: int, ef_bits: float, window_size: int
) -> None:
    units: list[Shapes] = [{str(index): shape for index, shape in enumerate(sizes)}]
    config = MicroAdamConfig(window_size=window_size, block_size=64, bucket_size=16, ef_bits=ef_bits)
    precision = Precision(2, 0, 2)
    whole = rank_memory(Engine.single, units, config, 1, 0, precision).optimizer
    for engine in (Engine.fsdp2, Engine.ddp_sharded):
        ranks = [rank_memory(engine, units, config, world_size, rank, precision) for rank in range(world_size)]
        assert sum(rank.optimizer for rank in ranks) == whole
        assert max(ranks, key=lambda rank: rank.optimizer).optimizer == ranks[0].optimizer


@settings(max_examples=amount(600), deadline=None)
@given(shapes, st.integers(1, 6), st.sampled_from(list(Engine)))
def test_shards_tile_the_parameters(sizes: list[tuple[int, ...]], world_size: int, engine: Engine) -> None:
    units: list[Shapes] = [{str(index): shape} for index, shape in enumerate(sizes)]
    ranks = [rank_shards(engine, units, world_size, rank, compute_bytes=2) for rank in range(world_size)]
    replicas = world_size if engine in (Engine.single, Engine.ddp, Engine.zero0) else 1
    pieces: dict[str, list[tuple[int, int]]] = {}
    for rank in ranks:
        for span in (span for spans in rank.stepped for span in spans if span.numel):
            pieces.setdefault(span.fqn, []).append((span.start, span.start + span.numel))
    for unit in units:
        for name in unit:
            ends = sorted(pieces[name])[::replicas]
            assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
            assert ends[-1][1] == numel({name: unit[name]})


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"gpus": 2}, "--gpus 2 with --engine single, which is one process"),
        ({"gpus": 0, "engine": Engine.ddp}, "gpus=0: expected at least 1"),
        ({"engine": Engine.ddp, "gradient_release": True}, "it works with single and fsdp2"),
        ({"engine": Engine.fsdp2, "offload_optimizer": True}, "DeepSpeed has it under ZeRO-1, 2 and 3"),
        ({"engine": Engine.zero2, "offload_optimizer": True, "master_free": True}, "with an fp32 copy"),
        ({"engine": Engine.fsdp2, "master_free": True}, "use --dtype pure-bf16"),
        ({"engine": Engine.zero3, "dtype": Dtype.pure_bf16}, "use --dtype bf16 --master-free"),
    ],
)
def test_jobs_an_engine_cannot_run(job: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job(**job)  # type: ignore[arg-type]


def test_gpus_are_chosen_by_what_is_left_on_them() -> None:
    assert [gpu.gib for gpu in GPUS] == sorted(gpu.gib for gpu in GPUS)
    assert all(gpu.gib < gpu.nominal_gb for gpu in GPUS)
    # 22 GiB of tensors are below 24 GB, but not with the reserve on a board that leaves 22.03 GiB.
    assert needed_bytes(20 * GIB) == int(20.6 * GIB) + CONTEXT_BYTES
    for gib, names in ((20, "A10, L4"), (22, "RTX 3090, RTX 4090"), (23, "V100, RTX 5090"), (0, GPUS[0].names)):
        gpu = smallest_gpu(gib * GIB)
        assert gpu and gpu.names == names
    assert smallest_gpu(178 * GIB) is None


def test_state_of_an_empty_rank() -> None:
    shards = rank_shards(Engine.fsdp2, [{"few": (2, 64)}], 4, 3, compute_bytes=4)
    assert all(state_bytes(optimizer, shards, CONFIG, Precision(4, 0, 4)) == 0 for optimizer in Optimizer)
    assert shards.weight_numel == 64  # padding
