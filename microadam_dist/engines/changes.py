"""Messages that say which weights changed, and by how much; for engines that pass new weights on to other ranks.

A rank updates its share of the weights and tells the others only what differs from what they expect:

- expected is the old weight, decayed where everybody can compute that; what it takes travels with the message.
- the sender finds the differences by comparing bits, so the result is exact whatever the step did.
- a rank asks for a dense gather when its message would not be shorter than its share.

Message of a piece of a share, in bytes: gaps, narrow, wide.

    gaps    4 bits each: 0..14 pass that many unchanged weights and mark the next as changed, 15 passes 15 weights
    narrow  new minus expected, both read as integers, one byte shorter than the weight; the lowest number: look in wide
    wide    differences that need all bytes; all of them, and no narrow ones, where that is shorter

At 10 % changed that is 0.64 bytes for a position, and for the value 1 (bf16) or 3 (fp32) where a step is small against
the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic.rounding import counters, round_weights, shape_key
from ..layout import ShardSpan

# A share is compared, encoded and sent in pieces of this many weights, to bound the temporaries.
PIECE_NUMEL = 1 << 24
_LONGEST_GAP = 15
_BITS = {2: torch.int16, 4: torch.int32}

# The ranks' tensors (n,), stacked: (ranks, n). A collective.
AllGather = Callable[[Tensor], Tensor]


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


class Decay(NamedTuple):
    """A step without an update.

    Attributes:
        factor: On the old weights.
        step_key: Of stochastic rounding, see `arithmetic.rounding`; None: to nearest.
    """

    factor: float
    step_key: int | None


class Message(NamedTuple):
    """What a rank tells the others.

    Attributes:
        decay: Of the old weights.
        counts: Of each piece.
        payloads: (bytes,) uint8 of each piece.
    """

    decay: Decay
    counts: list[Counts]
    payloads: list[Tensor]


def pieces(numel: int) -> list[slice]:
    """The pieces of a share."""
    return [slice(start, min(start + PIECE_NUMEL, numel)) for start in range(0, numel, PIECE_NUMEL)]


def compare(
    old_and_new: Iterable[tuple[Tensor, Tensor]], decay: Decay, spans: Sequence[ShardSpan], max_bytes: int
) -> Message | None:
    """The message about a share, given by pieces; None where it would take ``max_bytes`` or more.

    Args:
        old_and_new: Weights of each piece.
        decay: Of the old ones.
        spans: What the share holds.
        max_bytes: Of the payloads.
    """
    message = Message(decay, [], [])
    num_bytes = start = 0
    for old, new in old_and_new:
        payload, counts = encode(decayed(old, decay, spans, start), new)
        start += len(old)
        message.payloads.append(payload)
        message.counts.append(counts)
        num_bytes += len(payload)
        if num_bytes >= max_bytes:
            return None
    return message


def exchange(
    message: Message | None,
    shares: Sequence[Tensor],
    spans: Sequence[Sequence[ShardSpan]],
    own_rank: int,
    all_gather: AllGather,
) -> bool:
    """Exchange messages. In place: the other ranks' shares become what they are there.

    Args:
        message: About this rank's share; None asks for a dense gather.
        shares: The old weights of each rank's share, (n,) each, lengths may differ; those of ``own_rank`` are not used.
        spans: What each share holds.
        own_rank: This rank.
        all_gather: Among the ranks that hold the shares.

    Returns:
        Whether it was done; on all ranks alike. If not, a rank asked for a dense gather and nothing was changed.
    """
    num_pieces = [len(pieces(share.numel())) for share in shares]
    header = torch.full((2 + 3 * max(num_pieces),), math.nan, dtype=torch.float64)  # exact for all it carries
    if message is not None:
        factor, step_key = message.decay
        numbers = [factor, -1 if step_key is None else step_key, *chain.from_iterable(message.counts)]
        header[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    headers = all_gather(header.to(shares[own_rank].device)).tolist()
    if message is None or any(math.isnan(factor) for factor, *_ in headers):
        return False
    width = shares[own_rank].element_size()
    for index in range(max(num_pieces)):
        counts_of = {rank: _counts(headers[rank], index) for rank in range(len(shares)) if index < num_pieces[rank]}
        payload = message.payloads[index] if index < num_pieces[own_rank] else shares[own_rank].new_empty(0).byte()
        # Neither gloo nor NCCL gathers tensors of different lengths.
        longest = max(counts.num_bytes(width) for counts in counts_of.values())
        received = all_gather(torch.nn.functional.pad(payload, (0, longest - len(payload))))
        for rank, counts_there in counts_of.items():
            if rank != own_rank:
                piece = pieces(shares[rank].numel())[index]
                weights = shares[rank][piece]
                decay = _decay(headers[rank])
                if decay.factor != 1.0:
                    weights.copy_(decayed(weights, decay, spans[rank], piece.start))
                apply_(weights, received[rank, : counts_there.num_bytes(width)], counts_there)
    return True


def _decay(header: Sequence[float]) -> Decay:
    return Decay(header[0], None if header[1] < 0 else int(header[1]))


def _counts(header: Sequence[float], index: int) -> Counts:
    return Counts(*(int(count) for count in header[2 + 3 * index : 5 + 3 * index]))


def decayed(weights: Tensor, decay: Decay, spans: Sequence[ShardSpan], start: int) -> Tensor:
    """Weights after a step without an update: computed in fp32 and rounded once, as every backend does.

    Args:
        weights: (n,), those of a share from number ``start`` on.
        decay: Of this step.
        spans: What the share holds.
        start: See ``weights``.
    """
    if decay.factor == 1.0:
        return weights
    places = None
    if decay.step_key is not None:
        places = weights.new_zeros(len(weights), dtype=torch.int32)  # padding has none
        for span in spans:
            first, end = max(span.offset, start), min(span.offset + span.numel, start + len(weights))
            if first < end:
                positions = torch.arange(span.origin + first, span.origin + end, device=weights.device)
                places[first - start : end - start] = counters(positions, decay.step_key, shape_key(span.global_shape))
    return round_weights(weights.float() * decay.factor, weights.dtype, places)


# ---------------------------------------------------------------- one piece


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
