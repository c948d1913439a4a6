"""DeepSpeed ZeRO-1 and 2: after the step, exchange the weights that changed instead of gathering all of them.

A rank of ZeRO-1, 2 updates its share of every group's master weights and then sends the whole share, rounded to the
model's dtype, to all others. MicroAdam changes about a tenth of it in a step. With ``"sparse_allgather": true`` a rank
sends only what differs from what the others expect:

- expected is the old weight, decayed where that can be known: if the master weights have the model's dtype, a weight
  that is not touched becomes ``p * (1 - lr * weight_decay)``, which everybody computes; the factor travels with the
  message. A 16-bit weight with an fp32 master is a rounding from which its decayed value does not follow: there the
  old weight is expected, and one whose rounding moved is sent like a touched one.
- the sender finds the differences by comparing bits, so the result is exact whatever the step did.
- a group is gathered densely, by DeepSpeed's own function, when a message would not be shorter, at the first step,
  after one that failed, and after weights were written to in place (a loaded checkpoint). What is written through
  ``.data`` is not noticed, and must be the same on all ranks.

Message of a piece of a share, in bytes: gaps, narrow, wide.

    gaps    4 bits each: 0..14 pass that many unchanged weights and mark the next as changed, 15 passes 15 weights
    narrow  new minus expected, both read as integers, one byte shorter than the weight; the lowest number: look in wide
    wide    differences that need all bytes; all of them, and no narrow ones, where that is shorter

At 10 % changed that is 0.64 bytes for a position, and for the value 1 (bf16) or 3 (fp32) where a step is small against
the weight.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError

# A share is compared, encoded and sent in pieces of this many weights, to bound the temporaries.
PIECE_NUMEL = 1 << 24
TESTED_VERSIONS = "0.19."  # the code below was written against 0.19.8
_GATHER = "all_gather_dp_groups"
_LONGEST_GAP = 15
_BITS = {2: torch.int16, 4: torch.int32}


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
    exchange = WeightExchange(zero, step.__globals__[_GATHER])
    names = {**step.__globals__, _GATHER: exchange.gather}
    copy = types.FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
    zero.step = types.MethodType(copy, zero)
    zero._optimizer_step = exchange.optimizer_step


class WeightExchange:
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
        weights = shares[_rank(zero.real_dp_process_group[group])]
        master = zero.single_partition_of_fp32_groups[group]
        settings = zero.optimizer.param_groups[group]
        decay = 1 - float(settings["lr"]) * float(settings["weight_decay"]) if master.dtype == weights.dtype else 1.0
        message = Message(Header(decay, []), [])
        num_bytes = 0
        for piece in _pieces(weights):
            new = master[piece].to(weights.dtype).to(weights.device)  # rounded where DeepSpeed rounds it
            payload, counts = encode(_decayed(weights[piece], decay), new)
            message.payloads.append(payload)
            message.header.counts.append(counts)
            num_bytes += len(payload)
            if num_bytes >= weights.nbytes:
                return None
        return message

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
            groups_flat: The model's weights, one flat tensor a group; every rank's share but its own is written.
            partitioned_param_groups: Views of their shares, by rank.
            dp_process_group: The ranks of each group.
            settings: Passed on to the dense gather.
        """
        for group, shares in enumerate(partitioned_param_groups):
            if len(shares) == 1:
                continue
            ranks = dp_process_group[group]
            own = shares[_rank(ranks)]
            message = self._messages.pop(group)
            headers = self._exchange_headers(message, own, ranks)
            self._zero.optimizer.exchanged_bytes.dense += own.nbytes
            if message is None or any(math.isnan(header.decay) for header in headers):
                self._dense_gather([groups_flat[group]], [shares], [ranks], **settings)
                self._zero.optimizer.exchanged_bytes.sent += own.nbytes
            else:
                self._exchange_changes(message.payloads, headers, shares, ranks)
            self._synchronized[group] = self._versions(group)

    def _exchange_headers(self, message: Message | None, share: Tensor, ranks: Any) -> list[Header]:
        header = Header.dense(len(list(_pieces(share)))) if message is None else message.header
        floats = torch.tensor(header.to_floats(), dtype=torch.float64, device=share.device)
        return [Header.from_floats(received) for received in self._all_gather(floats, ranks).tolist()]

    def _exchange_changes(
        self, payloads: Sequence[Tensor], headers: Sequence[Header], shares: Sequence[Tensor], ranks: Any
    ) -> None:
        own_rank = _rank(ranks)
        width = shares[own_rank].element_size()
        for index, piece in enumerate(_pieces(shares[own_rank])):
            lengths = [header.counts[index].num_bytes(width) for header in headers]
            # Neither gloo nor NCCL gathers tensors of different lengths.
            padded = torch.nn.functional.pad(payloads[index], (0, max(lengths) - lengths[own_rank]))
            received = self._all_gather(padded, ranks)
            for rank, header in enumerate(headers):
                if rank != own_rank:
                    weights = shares[rank][piece]
                    if header.decay != 1.0:
                        weights.copy_(_decayed(weights, header.decay))
                    apply_(weights, received[rank, : lengths[rank]], header.counts[index])

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


def _rank(ranks: Any) -> int:
    return torch.distributed.get_rank(ranks)


def _pieces(share: Tensor) -> Iterator[slice]:
    for start in range(0, share.numel(), PIECE_NUMEL):
        yield slice(start, min(start + PIECE_NUMEL, share.numel()))


def _decayed(weights: Tensor, decay: float) -> Tensor:
    """A step without an update: computed in fp32 and rounded once, as every backend does."""
    return weights if decay == 1.0 else (weights.float() * decay).to(weights.dtype)


# ---------------------------------------------------------------- messages


class Counts(NamedTuple):
    """Lengths in the payload of one piece."""

    gap_bytes: int
    changed: int
    wide: int

    def narrow_bytes(self, width: int) -> int:
        """Bytes of the narrow differences of weights of ``width`` bytes."""
        return 0 if self.wide == self.changed else self.changed * (width - 1)

    def num_bytes(self, width: int) -> int:
        """Bytes of the payload."""
        return self.gap_bytes + self.narrow_bytes(width) + self.wide * width


class Header(NamedTuple):
    """What the receivers must know first; goes as float64, which is exact for all of it.

    Attributes:
        decay: Factor on the old weights; NaN asks for a dense gather.
        counts: Of each piece.
    """

    decay: float
    counts: list[Counts]

    @classmethod
    def dense(cls, num_pieces: int) -> Header:
        """Ask for a dense gather."""
        return cls(math.nan, [Counts(0, 0, 0)] * num_pieces)

    @classmethod
    def from_floats(cls, floats: Sequence[float]) -> Header:
        """Undo `to_floats`."""
        numbers = [int(count) for count in floats[1:]]
        return cls(floats[0], [Counts(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)])

    def to_floats(self) -> list[float]:
        """As long for every rank of a group."""
        return [self.decay, *(float(count) for counts in self.counts for count in counts)]


class Message(NamedTuple):
    """What a rank sends of one group: its header, and the payload (bytes,) uint8 of each piece."""

    header: Header
    payloads: list[Tensor]


def encode(expected: Tensor, new: Tensor) -> tuple[Tensor, Counts]:
    """The payload that says where and by how much the bits of ``new`` differ from those of ``expected``.

    Args:
        expected, new: (n,), of one dtype of 2 or 4 bytes.

    Returns:
        (bytes,) uint8, and the lengths in it.
    """
    width = new.element_size()
    bits = _BITS[width]
    delta = new.view(bits) - expected.view(bits)  # wraps around, and so does the sum in `apply_`
    positions = delta.nonzero().flatten()
    delta = delta[positions]

    lowest = _lowest_narrow(width)
    is_wide = (delta <= lowest) | (delta >= -lowest)
    wide = delta[is_wide]
    narrow = delta.masked_fill(is_wide, lowest).view(torch.uint8).view(len(delta), width)[:, :-1]  # little-endian
    if len(wide) * width >= len(delta):
        wide, narrow = delta, narrow[:0]
    gaps = _encode_gaps(positions)
    payload = torch.cat((gaps, narrow.flatten(), wide.view(torch.uint8)))
    return payload, Counts(len(gaps), len(delta), len(wide))


def apply_(weights: Tensor, payload: Tensor, counts: Counts) -> None:
    """Undo `encode`. In place: the expected weights (n,) become the new ones."""
    width = weights.element_size()
    bits = _BITS[width]
    wide_start = counts.gap_bytes + counts.narrow_bytes(width)
    gaps, narrow, wide = payload[: counts.gap_bytes], payload[counts.gap_bytes : wide_start], payload[wide_start:]

    delta = wide.clone().view(bits)  # clone: the bytes begin anywhere
    if len(narrow):
        shifted = narrow.new_zeros(counts.changed, width)
        shifted[:, 1:] = narrow.view(counts.changed, width - 1)
        extended = shifted.view(bits).flatten() >> 8  # copies the sign
        delta = extended.masked_scatter(extended == _lowest_narrow(width), delta)
    weights.view(bits)[_decode_gaps(gaps)] += delta


def _lowest_narrow(width: int) -> int:
    """The lowest number of ``width - 1`` bytes."""
    return -(1 << (8 * width - 9))


def _encode_gaps(positions: Tensor) -> Tensor:
    """Ascending positions (k,) int64 as bytes of two gaps each, the first in the low bits."""
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    ends = (gaps // _LONGEST_GAP + 1).cumsum(0)
    num_gaps = int(ends[-1]) if len(ends) else 0
    nibbles = torch.full((num_gaps + num_gaps % 2,), _LONGEST_GAP, dtype=torch.uint8, device=positions.device)
    nibbles[ends - 1] = (gaps % _LONGEST_GAP).to(torch.uint8)
    return nibbles[0::2] | nibbles[1::2] << 4


def _decode_gaps(packed: Tensor) -> Tensor:
    """Undo `_encode_gaps`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).flatten()
    is_changed = nibbles < _LONGEST_GAP
    ends = (nibbles + is_changed).cumsum(0, dtype=torch.int64)
    return ends[is_changed] - 1
