"""Settings with which a job fits a GPU: how long the sequences, how large the batches of each can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from .activations import default_loss_chunk
from .engines import Dtype, Engine
from .gpus import GPUS, needed_bytes
from .memory import Job, Optimizer, make_plan
from .shapes import LlamaShape

BITS = (4, 2, 1.6, 1, 0)  # of the error feedback; 8 cost more than 4 and gained nothing
MAX_TOKENS = 2**20


@dataclass(frozen=True)
class Proposal:
    """One choice of settings.

    Attributes:
        job: With these settings.
        state: Bytes of optimizer state on the fullest rank.
        peak: Bytes there in all.
        needed: What a GPU must have for that, see `needed_bytes`.
        host: Bytes of activations that each step moves to host memory and back.
        seq: The longest sequence that fits in a batch of one, a power of two; 0: none does.
        batch: The largest batch of sequences as long as the job's; 0: none fits.
    """

    job: Job
    state: int
    peak: int
    needed: int
    host: int
    seq: int
    batch: int


def capacity(nominal_gb: int) -> int:
    """Bytes of the GPUs sold with so much memory: of those that train in bf16 the smallest.

    Where there is no such GPU, as many GiB.
    """
    sizes = [gpu.num_bytes for gpu in GPUS if gpu.nominal_gb == nominal_gb and gpu.bf16]
    return min(sizes, default=nominal_gb * 2**30)


def least_memory(job: Job, shape: LlamaShape) -> Job:
    """The job as ``launch/train.py --single-gpu`` trains; with an engine that cannot do so, as it is."""
    if job.engine not in (Engine.single, Engine.fsdp2):
        return job
    chunk = job.loss_chunk or (default_loss_chunk(shape.vocab) if job.engine is Engine.single else None)
    return dataclasses.replace(
        job, dtype=Dtype.pure_bf16, gradient_release=True, activation_checkpointing=True, loss_chunk=chunk
    )


def propose(shape: LlamaShape, job: Job, num_bytes: int) -> list[Proposal]:
    """All choices of error-feedback bits, with activations on the device and in host memory."""
    job = least_memory(job, shape)
    offloads = (False, True) if job.activation_checkpointing else (False,)
    return [
        _proposal(
            shape,
            dataclasses.replace(
                job, offload_activations=offload, config=dataclasses.replace(job.config, ef_bits=ef_bits)
            ),
            num_bytes,
        )
        for ef_bits in BITS
        for offload in offloads
    ]


def _proposal(shape: LlamaShape, job: Job, num_bytes: int) -> Proposal:
    def fits(batch: int, seq: int) -> bool:
        plan = make_plan(shape, dataclasses.replace(job, batch=batch, seq=seq))[Optimizer.microadam]
        return needed_bytes(plan.total) <= num_bytes

    plan = make_plan(shape, job)[Optimizer.microadam]
    doublings = _largest(lambda n: fits(1, 2 ** (n - 1)), MAX_TOKENS.bit_length())
    return Proposal(
        job,
        state=plan.optimizer_state,
        peak=plan.total,
        needed=needed_bytes(plan.total),
        host=plan.host,
        seq=2 ** (doublings - 1) if doublings else 0,
        batch=_largest(lambda n: fits(n, job.seq), MAX_TOKENS // job.seq),
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number in 1..limit that fits, or 0; what is smaller than one that fits does, too."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
