"""Bytes on one rank: what is allocated for good, and what is added at the peak of a training step. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..layout import ShardSpan, StateLayout
from .activations import activations
from .engines import Dtype, Engine, Precision, RankShards, find_precision, rank_shards
from .shapes import LlamaShape, Shapes, numel

# Defaults of DeepSpeed 0.19.8, in elements.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters
SUB_GROUP = 1_000_000_000

# bitsandbytes: blocks of 8-bit moments share an fp32 scale; smaller tensors keep fp32 moments.
BLOCK_8BIT, MIN_NUMEL_8BIT = 256, 4096


class Optimizer(str, Enum):
    """What is compared."""

    microadam = "MicroAdam"
    adamw_8bit = "8-bit AdamW"
    adamw = "AdamW"


@cache  # layers repeat
def _microadam_bytes(span_shape: tuple[int, ...], start: int, length: int, config: MicroAdamConfig) -> int:
    layout = StateLayout((ShardSpan("", span_shape, start, length),), config)
    return layout.sparse_bytes + layout.dense_bytes


def state_bytes(optimizer: Optimizer, shards: RankShards, config: MicroAdamConfig, precision: Precision) -> int:
    """State of one rank, without step counters: MicroAdam's, bitsandbytes' AdamW8bit's or `torch.optim.AdamW`'s."""
    if optimizer is Optimizer.microadam:
        spans = (span for spans in shards.stepped for span in spans)
        return sum(_microadam_bytes(span.global_shape, span.start, span.numel, config) for span in spans)
    if optimizer is Optimizer.adamw:  # moments have the dtype of the tensors that are stepped
        return 2 * precision.stepped * sum(shards.stepped_numels)
    return sum(
        2 * (length + 4 * -(-length // BLOCK_8BIT)) if length >= MIN_NUMEL_8BIT else 8 * length
        for length in shards.stepped_numels
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run.

    Args:
        engine: How the model is spread over the ranks.
        gpus: Data-parallel ranks.
        dtype: Precision.
        batch: Sequences of a micro-batch on each rank.
        seq: Tokens of a sequence.
        config: Settings of MicroAdam.
        gradient_release: Weights are updated in the backward pass, each gradient is freed at once.
        activation_checkpointing: Every decoder layer is recomputed in the backward pass.
        offload_activations: With it, the inputs of layers wait in host memory.
        offload_optimizer: ZeRO keeps master weights, their gradients and optimizer state in host memory.
        master_free: ZeRO steps a bf16 copy of the weights instead of an fp32 one.
        loss_chunk: Tokens whose logits exist at a time; all by default.

    Raises:
        ConfigError: The engine cannot run such a job.
    """

    engine: Engine = Engine.single
    gpus: int = 1
    dtype: Dtype = Dtype.bf16
    batch: int = 1
    seq: int = 2048
    config: MicroAdamConfig = MicroAdamConfig()
    gradient_release: bool = False
    activation_checkpointing: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False
    master_free: bool = False
    loss_chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "batch", "seq", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1.")
        if self.engine is Engine.single and self.gpus > 1:
            raise ConfigError(f"--gpus {self.gpus} with --engine single, which is one process; choose another engine.")
        if self.gradient_release and self.engine not in (Engine.single, Engine.fsdp2):
            raise ConfigError(
                f"--gradient-release with --engine {self.engine.value}: gradients are reduced after they are "
                "accumulated, so they cannot be released; it works with single and fsdp2."
            )
        if self.offload_activations and not self.activation_checkpointing:
            raise ConfigError(
                "--offload-activations moves what activation checkpointing keeps; add --activation-checkpointing."
            )
        if self.offload_optimizer and (self.master_free or not self.engine.shards_optimizer):
            raise ConfigError(
                f"--offload-optimizer with --engine {self.engine.value}{' --master-free' * self.master_free}: "
                "DeepSpeed has it under ZeRO-1, 2 and 3 with an fp32 copy of the weights."
            )
        _ = self.precision

    @property
    def precision(self) -> Precision:
        """Bytes of an element on its engine."""
        return find_precision(self.engine, self.dtype, master_free=self.master_free)

    @property
    def has_autocast(self) -> bool:
        """Whether fp32 weights are cast at each use; FSDP casts the whole unit instead."""
        is_mixed = self.dtype is Dtype.bf16 and not self.engine.is_zero
        return is_mixed and self.engine not in (Engine.fsdp1, Engine.fsdp2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of tensors on the fullest rank: what stays, and what the two phases of a training step add.

    The optimizer step is taken to need nothing but state and gradients (a fused kernel).

    Attributes:
        weights, master, optimizer_state: What stays.
        gradients: In the backward pass. Together with `activations` an upper bound: the last of the one meet the first
            of the other only when gradients are accumulated over micro-batches.
        activations, logits, working: See `Activations`.
        buffers: Of the engine, in the backward pass.
        step_gradients, step_buffers: In the optimizer step, when no activations are left.
        host: In host memory.
    """

    weights: int
    master: int
    optimizer_state: int
    gradients: int
    activations: int
    logits: int
    working: int
    buffers: int
    step_gradients: int
    step_buffers: int
    host: int = 0

    @property
    def resident(self) -> int:
        """What stays."""
        return self.weights + self.master + self.optimizer_state

    @property
    def backward(self) -> int:
        """What the backward pass adds."""
        return self.gradients + self.activations + self.logits + self.working + self.buffers

    @property
    def step(self) -> int:
        """What the optimizer step adds."""
        return self.step_gradients + self.step_buffers

    @property
    def total(self) -> int:
        """The peak."""
        return self.resident + max(self.backward, self.step)


def make_plan(shape: LlamaShape, job: Job) -> dict[Optimizer, Plan]:
    """What training the model takes on the fullest rank, with each optimizer."""
    precision, units = job.precision, shape.units()
    ranks = [rank_shards(job.engine, units, job.gpus, i, compute_bytes=precision.compute) for i in range(job.gpus)]
    kept = activations(
        shape,
        batch=job.batch,
        seq=job.seq,
        compute_bytes=precision.compute,
        autocast=job.has_autocast,
        checkpointing=job.activation_checkpointing,
        offload=job.offload_activations,
        loss_chunk=job.loss_chunk,
    )
    weights = precision.weight * ranks[0].weight_numel
    master = precision.master * sum(ranks[0].stepped_numels)
    gradients, step_gradients, step_buffers = gradient_bytes(units, job, ranks[0])
    offloaded = master + precision.master * ranks[0].grad_numel if job.offload_optimizer else 0
    plans = {}
    for optimizer in Optimizer:
        state = max(state_bytes(optimizer, shards, job.config, precision) for shards in ranks)
        plans[optimizer] = Plan(
            weights=weights,
            master=0 if job.offload_optimizer else master,
            optimizer_state=0 if job.offload_optimizer else state,
            gradients=gradients,
            activations=kept.saved,
            logits=kept.logits,
            working=kept.working,
            buffers=buffer_bytes(units, job),
            step_gradients=step_gradients,
            step_buffers=step_buffers,
            host=kept.host + (offloaded + state if job.offload_optimizer else 0),
        )
    return plans


def gradient_bytes(units: Sequence[Shapes], job: Job, shards: RankShards) -> tuple[int, int, int]:
    """Bytes of gradients in the backward pass and in the step, and of copies of gradients in the step."""
    precision, engine = job.precision, job.engine
    in_backward = precision.weight * shards.weight_numel
    largest = precision.weight * max(math.prod(shape) for unit in units for shape in unit.values())
    if engine is Engine.zero0:  # DeepSpeed copies the gradients for its fp32 copy of the weights
        return in_backward, in_backward + precision.master * shards.grad_numel, 0
    if engine.shards_optimizer:
        share = shards.grad_numel
        # ZeRO-1 has all of them, the others one on its way to the bucket; and the share that this rank steps.
        unreduced = in_backward if engine is Engine.zero1 else largest
        if job.offload_optimizer:
            return unreduced, 0, 0
        # The share is flattened (zero3: one sub-group of it), then cast to the dtype of the master weights.
        flattened = min(share, SUB_GROUP) if engine is Engine.zero3 else share
        cast = precision.master * flattened if precision.master != precision.weight else 0
        buffers = precision.weight * REDUCE_BUCKET if engine is Engine.zero3 else 0
        return unreduced + precision.weight * share, precision.weight * (share + flattened) + cast, buffers
    if job.gradient_release:
        released = largest
        if engine is Engine.fsdp2:  # a unit's gradients are reduced together
            released = precision.weight * max(
                rank_shards(engine, [unit], job.gpus, 0, compute_bytes=precision.compute).grad_numel for unit in units
            )
        return released, released, 0
    buckets = in_backward if engine in (Engine.ddp, Engine.ddp_sharded) else 0  # DDP's stay between steps
    return in_backward, in_backward, buckets


def buffer_bytes(units: Sequence[Shapes], job: Job) -> int:
    """Bytes an engine adds in the backward pass at most, with its default settings.

    ZeRO reduces gradients in a bucket, and ZeRO-3 keeps gathered parameters up to a limit. DDP copies every gradient to
    a bucket. FSDP keeps the root unit gathered, and its gradients whole, while it works on one decoder layer and
    gathers the next one; FSDP2 also copies what it gathers and what it reduces. Autocast keeps a copy of each weight
    that is multiplied.

    Source: that of DeepSpeed 0.19.8 and torch 2.13. `tests/planner/test_peak.py` measures ZeRO-0, 1, 2 and FSDP on CPU
    ranks, where FSDP overlaps less and needs less; the limits of ZeRO-3 are not measured.
    """
    precision, engine = job.precision, job.engine
    total = sum(map(numel, units))
    if engine is Engine.zero0:
        return precision.weight * min(total, REDUCE_BUCKET)
    if engine is Engine.zero3:
        gathered = min(total, MAX_LIVE_PARAMETERS)
        return precision.weight * (REDUCE_BUCKET + min(total, REDUCE_BUCKET) + gathered)
    if engine.is_zero:
        return precision.weight * REDUCE_BUCKET
    if engine in (Engine.fsdp1, Engine.fsdp2):
        root, layer = numel(units[0]), max(map(numel, units[1:]), default=0)
        copies = 2 if engine is Engine.fsdp2 else 0
        return precision.compute * (2 * root + (2 + 1 + copies) * layer)
    casts = 0
    if job.has_autocast:  # the embedding is looked up, unless it is the output projection as well
        multiplied = {name: s for unit in units for name, s in unit.items() if len(s) > 1}
        if "lm_head.weight" in multiplied:
            del multiplied["model.embed_tokens.weight"]
        casts = precision.compute * numel(multiplied)
    buckets = 0 if engine is Engine.single else precision.weight * total
    return buckets + casts
