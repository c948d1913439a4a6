"""DeepSpeed ZeRO-1 and 2: after the step, exchange the weights that changed instead of gathering all of them.

A rank of ZeRO-1, 2 updates its share of every group's master weights and then sends the whole share, rounded to the
model's dtype, to all others. MicroAdam changes about a tenth of it in a step. With ``"sparse_allgather": true`` a rank
sends only what differs from what the others expect, see `changes`:

- if the master weights have the model's dtype, everybody computes the decay of a weight that is not touched,
  ``p * (1 - lr * weight_decay)``, in bf16 rounded as its rank does. A 16-bit weight with an fp32 master is a rounding
  from which its decayed value does not follow: there the old weight is expected, and one whose rounding moved is sent
  like a touched one.
- a group is gathered densely, by DeepSpeed's own function, when a rank's message would not be shorter, at the first
  step, after one that failed, and after weights were written to in place (a loaded checkpoint). What is written through
  ``.data`` is not noticed, and must be the same on all ranks.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arithmetic.rounding import is_stochastic, step_key
from ..errors import ConfigError
from ..layout import ShardSpan
from .changes import Decay, Message, compare, exchange, pieces
from .cuts import share_spans

TESTED_VERSIONS = "0.19."  # the code below was written against 0.19.8
_GATHER = "all_gather_dp_groups"


def prepare(engine: Any, wrapper: Any) -> None:
    """Make the engine, which is being built, exchange changed weights. Other engines in the process are not affected.

    With a DeepSpeed that is not known to gather as the tested one does, nothing is replaced and a warning says so.

    Args:
        engine: A DeepSpeed engine before it wraps the optimizer, which asks for it.
        wrapper: What `DeepSpeedEngine._do_optimizer_sanity_check` says the optimizer will be wrapped in.

    Raises:
        ConfigError: No weights are gathered after the step in this mode, or not in the place that is replaced here.
    """
    import deepspeed
    from deepspeed.runtime.constants import BFLOAT16

    stage = int(engine.zero_optimization_stage())
    if stage not in (1, 2):
        raise ConfigError(
            f"optimizer option sparse_allgather is for ZeRO stages 1 and 2, zero_optimization.stage is {stage}: no "
            "weights are gathered after its step. Remove sparse_allgather or choose stage 1 or 2."
        )
    if wrapper == BFLOAT16:
        raise ConfigError(
            "optimizer option sparse_allgather does not work with DeepSpeed's BF16_Optimizer (stage 1, bf16, fp32 "
            "gradient accumulation). Choose stage 2, or remove sparse_allgather or data_types.grad_accum_dtype."
        )
    if not _gathers_as_tested():
        warnings.warn(
            f"sparse_allgather is not known to work with DeepSpeed {deepspeed.__version__} (tested: "
            f"{TESTED_VERSIONS}*): all weights are gathered after every step, as without the option.",
            stacklevel=2,
        )
        return
    configure = engine._configure_zero_optimizer

    def configure_and_install(base_optimizer: Any) -> Any:
        del engine._configure_zero_optimizer  # it hides the method for this one call
        zero = configure(base_optimizer)
        _install(zero)
        return zero

    engine._configure_zero_optimizer = configure_and_install


def _gathers_as_tested() -> bool:
    import deepspeed
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    code = getattr(DeepSpeedZeroOptimizer.step, "__code__", None)
    return deepspeed.__version__.startswith(TESTED_VERSIONS) and code is not None and _GATHER in code.co_names


def _install(zero: Any) -> None:
    """Replace the gather of one ZeRO-1, 2 optimizer: its ``step`` as it is, with another function under that name."""
    step = type(zero).step
    weights = SparseGather(zero, step.__globals__[_GATHER])
    names = {**step.__globals__, _GATHER: weights.gather}
    copy = types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
    zero.step = types.MethodType(copy, zero)
    zero._optimizer_step = weights.optimizer_step


class SparseGather:
    """Passes the new weights of one ZeRO-1, 2 optimizer on; all ranks of a group call it together.

    Args:
        zero: DeepSpeed's optimizer; the ``exchanged_bytes`` of the one inside it are counted up.
        dense_gather: DeepSpeed's `all_gather_dp_groups`.
    """

    def __init__(self, zero: Any, dense_gather: Any) -> None:
        self._zero = zero
        self._dense_gather = dense_gather
        self._base_step = zero._optimizer_step
        self._messages: dict[int, Message | None] = {}
        # Group -> version counters of its parameters when all ranks last had the same weights.
        self._synchronized: dict[int, list[int]] = {}

    def optimizer_step(self, group: int) -> None:
        """`DeepSpeedZeroOptimizer._optimizer_step`, then compare: here the model's weights are still the old ones."""
        self._base_step(group)
        self._messages[group] = self._message(group)

    @torch.no_grad()
    def _message(self, group: int) -> Message | None:
        """What this rank has to tell the others of a group; None if they need all its weights."""
        zero = self._zero
        shares = zero.parallel_partitioned_bit16_groups[group]
        # Taken out until the exchange is through: if the step fails before it, the ranks' weights may differ.
        if len(shares) == 1 or self._synchronized.pop(group, None) != self._versions(group):
            return None
        rank = torch.distributed.get_rank(zero.real_dp_process_group[group])
        weights, master = shares[rank], zero.single_partition_of_fp32_groups[group]
        rounded = (  # where DeepSpeed rounds it
            (weights[piece], master[piece].to(weights.dtype).to(weights.device)) for piece in pieces(len(weights))
        )
        return compare(rounded, self._decay(group), self._spans(group, rank), max_bytes=weights.nbytes)

    def _decay(self, group: int) -> Decay:
        """Of the step that has just been taken."""
        zero = self._zero
        master, settings = zero.single_partition_of_fp32_groups[group], zero.optimizer.param_groups[group]
        if master.dtype != zero.bit16_groups_flat[group].dtype:
            return Decay(1.0, None)
        factor = 1 - float(settings["lr"]) * float(settings["weight_decay"])
        if not is_stochastic(settings["rounding"], master.dtype):
            return Decay(factor, None)
        return Decay(factor, step_key(settings["seed"], int(zero.optimizer.state[master]["step"]) - 1))

    def _spans(self, group: int, rank: int) -> list[ShardSpan]:
        """What a rank's share of a group's weights holds."""
        numel = self._zero.parallel_partitioned_bit16_groups[group][rank].numel()
        params = self._zero.bit16_groups[group]
        placed = (("", tuple(param.shape), int(param.storage_offset())) for param in params)
        return list(share_spans(placed, rank * numel, (rank + 1) * numel))

    @torch.no_grad()
    def gather(
        self,
        groups_flat: Sequence[Tensor],
        partitioned_param_groups: Sequence[Sequence[Tensor]],
        dp_process_group: Sequence[Any],
        **settings: Any,
    ) -> None:
        """Takes the place of `all_gather_dp_groups` in the step.

        Args:
            groups_flat: The model's weights, one flat tensor per group; every rank's share but its own is written.
            partitioned_param_groups: Views of their shares, by rank.
            dp_process_group: The ranks of each group.
            settings: Passed on to the dense gather.
        """
        for group, shares in enumerate(partitioned_param_groups):
            if len(shares) == 1:
                continue
            ranks = dp_process_group[group]
            own = torch.distributed.get_rank(ranks)
            self._zero.optimizer.exchanged_bytes.dense += shares[own].nbytes
            spans = [self._spans(group, rank) for rank in range(len(shares))]
            all_gather = functools.partial(self._all_gather, ranks=ranks)
            if not exchange(self._messages.pop(group), shares, spans, own, all_gather):
                self._dense_gather([groups_flat[group]], [shares], [ranks], **settings)
                self._zero.optimizer.exchanged_bytes.sent += shares[own].nbytes
            self._synchronized[group] = self._versions(group)

    def _all_gather(self, tensor: Tensor, ranks: Any) -> Tensor:
        """The ranks' tensors (n,), stacked: (ranks, n)."""
        import deepspeed.comm as dist

        received = tensor.new_empty(dist.get_world_size(group=ranks), tensor.numel())
        if tensor.numel():
            dist.all_gather_into_tensor(received.view(-1), tensor, ranks)
        self._zero.optimizer.exchanged_bytes.sent += tensor.nbytes
        return received

    def _versions(self, group: int) -> list[int]:
        """Counters that in-place writes from outside move; DeepSpeed's own writes go through ``.data`` and do not."""
        return [param._version for param in self._zero.bit16_groups[group]]
