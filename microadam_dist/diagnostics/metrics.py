"""How well a run compresses: the quantities of MicroAdam's convergence theorem, measured in the steps of a training.

With a the accumulator (gradient and decoded error), I what Top-K takes, r = a outside I the residual, Q quantization:

    q                  |r| / |a|           contraction of Top-K
    omega              |Q(r) - r| / |r|    error of the quantizer; 1 without error feedback, which stores nothing
    q_omega            (1 + omega) q       the theorem asks for less than 1: then the stored error stays bounded
    error_to_gradient  |Q(r)| / |g|        size of the stored error
    gradient_kept      |g[I]|^2 / |g|^2    share of the gradient's energy at the places that Top-K takes
    touched            share of the weights with a value in the window, which the step moves (beside weight decay)
    changed            share of the weights whose bits are others after the step: less where rounding takes moves back

The paper assumes a Top-K that leaves at most q |a|, and an unbiased quantizer that is off by at most omega |r|, for any
vector. Measured is what the vectors of one step gave. Our quantizer rounds to nearest, so it is not unbiased.

The numbers are estimates: they come from a sample of the Top-K blocks (`StateLayout.sample`, about one in 97 and at
least 7 of each parameter), and leave the dense path and skipped blocks out. Only norms over all of it are compared:
each is the root of a sum of squares over the sampled blocks on all ranks, each element counted once.

    nonfinite_blocks         all blocks skipped so far, added up over the ranks among which parameters are cut
    sent_bytes, dense_bytes  with sparse_allgather or shard_state: `ExchangedBytes` of this rank so far

Source: MicroAdam, arXiv:2405.15593, assumptions on the two compressors and convergence theorem; the estimate is ours.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..arithmetic.blocks import Blocks, block_views, concatenate
from ..arithmetic.rounding import is_stochastic, step_key
from ..arithmetic.scalars import StepScalars
from ..arithmetic.step import accumulate, keep_largest_, stored_error, stored_slots, update_weights_
from ..arithmetic.window import decode_slot
from ..backends.base import TensorStep
from ..config import MicroAdamConfig
from ..engines.collectives import process_rank
from ..errors import ConfigError

# Blocks are measured in pieces to bound the temporaries (about 60 bytes per element).
CHUNK_NUMEL = 1 << 17
_BITS = {2: torch.int16, 4: torch.int32}


class BlockSums(NamedTuple):
    """Sums over blocks: squares, and numbers of weights."""

    gradient: float = 0.0
    kept_gradient: float = 0.0
    accumulator: float = 0.0
    residual: float = 0.0
    quantization: float = 0.0
    error: float = 0.0
    touched: float = 0.0
    weights: float = 0.0
    changed: float = 0.0
    touched_to_nearest: float = 0.0  # 16-bit weights that are rounded to nearest ...
    still: float = 0.0  # ... and those of them that stay as they are

    def ratios(self) -> dict[str, float]:
        """The metrics; NaN where nothing can be compared."""
        q = math.sqrt(_ratio(self.residual, self.accumulator))
        omega = math.sqrt(_ratio(self.quantization, self.residual))
        return {
            "q": q,
            "omega": omega,
            "q_omega": (1 + omega) * q,
            "error_to_gradient": math.sqrt(_ratio(self.error, self.gradient)),
            "gradient_kept": _ratio(self.kept_gradient, self.gradient),
            "touched": _ratio(self.touched, self.weights),
            "changed": _ratio(self.changed, self.weights),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


class _Alike(NamedTuple):
    """What blocks have in common that are measured together."""

    group: dist.ProcessGroup | None
    made_for: MicroAdamConfig
    step: int
    num_kept: int
    numel: int
    dtype: torch.dtype
    device: torch.device


class Meter:
    """Measures every N-th step of one optimizer; reads the training, and changes no bit of it.

    The steps of a set of tensors are counted, not the calls: DeepSpeed steps each of its groups in a call of its own.
    Counted are the steps since the optimizer was constructed, without those that were skipped.

    Args:
        every: N.

    Attributes:
        every: N.
        metrics: Of the newest measured step, see above; a new dictionary each time, empty before the first.

    Raises:
        ConfigError: N is no positive integer.
    """

    def __init__(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"metrics_every={every!r}: expected 0 (off) or a number of steps.")
        self.metrics: dict[str, float] = {}
        self.every = every
        self._num_steps: Counter[Tensor | None] = Counter()  # by the first tensor of the param groups
        self._sums: dict[dist.ProcessGroup | None, Tensor] = {}  # of this rank, in the step that goes on
        self._totals = BlockSums()  # of all ranks, in the calls that belong to the newest measured step
        self._measured_step = 0
        self._has_warned = False

    def is_due(self, param_groups: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the step that goes on, or comes, is measured; the same on all ranks that step together."""
        return (self._num_steps[_first(param_groups)] + 1) % self.every == 0

    def measure(
        self,
        tensors: Iterable[tuple[TensorStep, dist.ProcessGroup | None]],
        config: MicroAdamConfig,
        grad_scale: float,
    ) -> None:
        """Add up what a step is about to do; call it before the step.

        Args:
            tensors: What the backend gets, and the ranks among which the tensor's parameters are cut.
            config: Settings of the step.
            grad_scale: Factor on every gradient.
        """
        # Blocks of several tensors are measured together: an operation on a few blocks costs as much as on many.
        waiting: dict[_Alike, list[Blocks]] = {}
        for tensor, group in tensors:
            for blocks, num_kept in _sampled_blocks(tensor, config):
                numel, dtype, device = blocks.param.shape[2], blocks.param.dtype, blocks.param.device
                alike = _Alike(group, tensor.layout.config, tensor.step, num_kept, numel, dtype, device)
                waiting.setdefault(alike, []).append(blocks)
                if sum(part.param.numel() for part in waiting[alike]) >= CHUNK_NUMEL:
                    self._add(alike, waiting.pop(alike), config, grad_scale)
        for alike, parts in waiting.items():
            self._add(alike, parts, config, grad_scale)

    def _add(self, alike: _Alike, parts: Sequence[Blocks], config: MicroAdamConfig, grad_scale: float) -> None:
        scalars = StepScalars.at(alike.step, config, grad_scale)
        sums = block_sums(concatenate(parts), alike.made_for, alike.num_kept, alike.step, scalars)
        if alike.group in self._sums:
            sums = self._sums[alike.group] + sums.to(self._sums[alike.group].device)
        self._sums[alike.group] = sums

    def end_step(self, optimizer: Any) -> None:
        """Count a step; if it was due, make its metrics: a collective of the ranks that share the parameters.

        Args:
            optimizer: The `MicroAdam` whose step is over.
        """
        if self.is_due(optimizer.param_groups):
            self._publish(optimizer)
        self._num_steps[_first(optimizer.param_groups)] += 1

    def _publish(self, optimizer: Any) -> None:
        step = self._num_steps[_first(optimizer.param_groups)] + 1
        if step != self._measured_step:
            self._measured_step, self._totals = step, BlockSums()
        skipped = {}  # by rank: one that belongs to several groups counts once
        # Of all parameters, also of those this rank holds no part of: all ranks meet in the same collectives.
        for group in dict.fromkeys(shard.sharding_group for shard in optimizer.sharded.shards().values()):
            sums = self._sums[group].tolist() if group in self._sums else list(BlockSums())
            for rank, num_skipped, theirs in _gather((process_rank()[0], optimizer.num_nonfinite_blocks, sums), group):
                skipped[rank] = num_skipped
                self._totals = BlockSums(*(mine + other for mine, other in zip(self._totals, theirs, strict=True)))
        self._sums = {}
        self._warn_of_still_weights()
        self.metrics = {**self._totals.ratios(), "nonfinite_blocks": float(sum(skipped.values()))}
        exchanged = optimizer.exchanged_bytes
        if exchanged.dense:
            self.metrics |= {"sent_bytes": float(exchanged.sent), "dense_bytes": float(exchanged.dense)}

    def _warn_of_still_weights(self) -> None:
        still, touched = self._totals.still, self._totals.touched_to_nearest
        if still > touched / 2 and not self._has_warned and process_rank()[0] == 0:
            self._has_warned = True
            warnings.warn(
                f"rounding to nearest leaves {still / touched:.0%} of the 16-bit weights that a step updates as they "
                "were: their updates are smaller than half of their last bit, and lost. Use bf16 weights with "
                "rounding='stochastic' (or 'auto'), fp32 weights, or a higher learning rate.",
                stacklevel=4,
            )


def block_sums(blocks: Blocks, config: MicroAdamConfig, num_kept: int, step: int, scalars: StepScalars) -> Tensor:
    """What one step does to B blocks, as `BlockSums`: (11,) float64.

    In place: error feedback and weights take their next values, so these are copies.

    Args:
        blocks: The blocks, with a gradient.
        config, num_kept, step, scalars: As in `arithmetic.step.microadam_step_`.
    """
    assert blocks.grad is not None
    gradient = blocks.grad.flatten(0, 1).float() * scalars.grad_scale
    accumulator = accumulate(blocks, blocks.grad, config, scalars)
    newest, residual, finite = keep_largest_(blocks, accumulator, config, num_kept, step)
    indices, values = decode_slot(newest)
    error = stored_error(blocks, config)
    if error is None:
        error = torch.zeros_like(residual)

    window_size = config.window_size
    older = stored_slots(blocks, [(step - age) % window_size for age in range(1, len(scalars.m_weights))])
    slots = [(indices, values), *older]
    touched = torch.zeros_like(residual, dtype=torch.bool)
    for index, value in slots:
        touched.scatter_(1, index, touched.gather(1, index) | (value != 0))
    before = blocks.param.clone()
    update_weights_(blocks, slots, finite, scalars)
    changed = (blocks.param.view(_BITS[before.element_size()]) != before.view(_BITS[before.element_size()])).flatten(
        0, 1
    )
    to_nearest = touched & (blocks.counters is None and before.element_size() == 2 and scalars.lr > 0)

    squares = (gradient, gradient.gather(1, indices), accumulator, residual, error - residual, error)
    norms = [torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64) for x in squares]
    of_weights = (touched, torch.ones_like(touched), changed, to_nearest, to_nearest & ~changed)
    numbers = [which.sum(1, keepdim=True) for which in of_weights]
    by_block = torch.cat([*(norm.square() for norm in norms), *numbers], dim=1)  # (B, 11)
    return torch.where(finite, by_block, 0.0).sum(0)


def _sampled_blocks(tensor: TensorStep, config: MicroAdamConfig) -> Iterator[tuple[Blocks, int]]:
    """Copies of the sampled blocks, in pieces of one run, and their number of kept elements."""
    key = step_key(config.seed, tensor.step) if is_stochastic(config.rounding, tensor.param.dtype) else None
    for run, rows, cols in tensor.layout.sample:
        blocks = block_views(tensor.layout, run, tensor.param, tensor.grad, tensor.state, range(run.rows), key)
        num_blocks = max(1, CHUNK_NUMEL // run.numel)
        for start in range(0, len(rows), num_blocks):
            piece = slice(start, start + num_blocks)
            yield blocks.copy_of(rows[piece], cols[piece]), run.num_kept


def _gather(message: Any, group: dist.ProcessGroup | None) -> Sequence[Any]:
    """What each rank of the group says; alone without a group."""
    if group is None:
        return [message]
    messages = [message] * group.size()
    dist.all_gather_object(messages, message, group=group)
    return messages


def _first(param_groups: Iterable[Mapping[str, Any]]) -> Tensor | None:
    return next((p for group in param_groups for p in group["params"]), None)
