"""Re-cuts state for other shards, by (parameter, global offset). Pure: tensors in, tensors out.

What is exact, and what is not. Master weights and the dense path's moments are copied element by element. So are
codes, bucket ranges and window of every block that is whole on both sides, and of every fragment with the same ends.
A block that is cut in another way than before is rebuilt (ours):

- its error is decoded, re-cut and quantized again in buckets that begin where its new fragment begins;
- of each slot it gets the entries that lie in it, if they are more than it keeps those with the largest magnitude;
  in a packed window they get a new scale and are rounded again;
- unused places of a slot are empty (value 0).

At most two blocks per rank and flat buffer are cut. ``step`` belongs to a local tensor; where parameters of different
step come together in one, it gets the largest, and slots move so that each keeps its age.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arithmetic.error_feedback import StoredError, decode_error, encode_error
from ..arithmetic.state import allocate_state
from ..arithmetic.window import Slot, decode_slot, encode_slot
from ..config import structural_difference
from ..errors import CheckpointMismatchError
from ..layout import DENSE_TENSORS, ERROR_TENSORS, WINDOW_TENSORS, ShardSpan, StateLayout


@dataclass(frozen=True)
class SourceShard:
    """One saved local tensor.

    Attributes:
        layout: What it describes.
        state: Its flat state tensors and ``step``; None when it has never been stepped.
        weights: The local tensor itself, flat.
        origin: Where it was read from, for messages.
    """

    layout: StateLayout
    state: Mapping[str, Tensor] | None
    weights: Tensor
    origin: str


@dataclass(frozen=True)
class _Piece:
    """An interval of a parameter in one source: the span's shard, its index in the layout, and its ends."""

    shard: SourceShard
    span_index: int
    start: int
    end: int

    @property
    def span(self) -> ShardSpan:
        return self.shard.layout.spans[self.span_index]


class Resharder:
    """Finds any interval of any parameter in a set of source shards.

    Args:
        sources: All local tensors of all ranks of one checkpoint, in any order; intervals may occur more than once.

    Attributes:
        rebuilt: (parameter, start, end) of every block or fragment that `state` could not copy but had to rebuild.

    Raises:
        CheckpointMismatchError: Sources that hold the same elements of a parameter differ there.
    """

    def __init__(self, sources: Iterable[SourceShard]) -> None:
        self.rebuilt: list[tuple[str, int, int]] = []
        self._pieces: dict[str, list[_Piece]] = {}
        for shard in sources:
            for index, span in enumerate(shard.layout.spans):
                if span.numel:
                    piece = _Piece(shard, index, span.start, span.start + span.numel)
                    self._pieces.setdefault(span.fqn, []).append(piece)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)
            _require_equal_copies(pieces)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters, by name."""
        return {fqn: pieces[0].span.global_shape for fqn, pieces in self._pieces.items()}

    def whole(self, fqn: str) -> Tensor:
        """All of a parameter, in the dtype in which it was saved."""
        first = self._pieces[fqn][0]
        span = ShardSpan.whole(fqn, first.span.global_shape)
        out = first.shard.weights.new_empty(span.numel)
        self.weights(StateLayout((span,), first.shard.layout.config), out)
        return out.view(span.global_shape)

    def weights(self, layout: StateLayout, out: Tensor) -> None:
        """Fill the spans of the local tensor ``out`` (flat); the elements between them stay as they are."""
        for span in layout.spans:
            for piece in self._cover(span):
                source = _slice(piece.span.offset - piece.span.start, piece.start, piece.end)
                out[_slice(span.offset - span.start, piece.start, piece.end)].copy_(piece.shard.weights[source])

    def state(
        self, layout: StateLayout, allocate: Callable[[StateLayout], dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | None:
        """State of a local tensor with that layout, on the CPU; None when none of its sources has been stepped.

        Args:
            layout: What the tensor holds.
            allocate: Makes the zeroed state tensors; in memory by default.

        Raises:
            CheckpointMismatchError: A part of a parameter is in no source, or settings or shapes differ.
        """
        pieces = [list(self._cover(span)) for span in layout.spans]
        # An empty local tensor has the step of the parameters it has none of.
        stepped_with = [piece for cover in pieces for piece in cover] or [
            piece for span in layout.spans for piece in self._pieces.get(span.fqn, ())
        ]
        steps = [int(piece.shard.state["step"]) for piece in stepped_with if piece.shard.state is not None]
        if not steps:
            return None
        state = allocate(layout) if allocate else allocate_state(layout, torch.device("cpu"))
        target = _Target(layout, state, max(steps))
        dense_start = 0
        for index, span in enumerate(layout.spans):
            stepped = [piece for piece in pieces[index] if piece.shard.state is not None]
            if span.is_dense:
                for piece in stepped:
                    _copy_moments(piece, state, dense_start - span.start)
                dense_start += span.numel
            else:
                for piece in stepped:
                    _require_same_settings(piece.shard, layout, span.fqn)
                    target.copy_whole_blocks(index, piece)
                for start, end in _cut_fragments(layout, span, stepped):
                    if target.rebuild(index, start, end, [p for p in stepped if p.start < end and start < p.end]):
                        self.rebuilt.append((span.fqn, start, end))
        return {"step": torch.tensor(target.step), **state}

    def states(self, layouts: Sequence[StateLayout]) -> list[dict[str, Tensor] | None]:
        """`state` of each."""
        return [self.state(layout) for layout in layouts]

    def _cover(self, span: ShardSpan) -> Iterator[_Piece]:
        """Disjoint pieces that make up the span, in order."""
        position, end = span.start, span.start + span.numel
        for piece in self._pieces.get(span.fqn, ()):
            if piece.end <= position or position >= end:
                continue
            if piece.start > position:
                break
            if piece.span.global_shape != span.global_shape:
                raise CheckpointMismatchError(
                    f"parameter {span.fqn!r} has shape {piece.span.global_shape} in {piece.shard.origin}, "
                    f"here {span.global_shape}. The checkpoint belongs to another model: load another one."
                )
            stop = min(piece.end, end)
            yield _Piece(piece.shard, piece.span_index, position, stop)
            position = stop
        if position < end:
            raise CheckpointMismatchError(
                f"elements {position} to {end} of parameter {span.fqn!r} are nowhere in the checkpoint. "
                "It belongs to another model, or a rank's file is missing: copy all of it, or load another one."
            )


@dataclass(frozen=True)
class _Target:
    """The state that is being filled."""

    layout: StateLayout
    state: dict[str, Tensor]
    step: int

    def copy_whole_blocks(self, span_index: int, piece: _Piece) -> None:
        """Copy the blocks that lie wholly inside the piece, hence are whole on both sides: they are contiguous."""
        grid = self.layout.grid(piece.span)
        first, first_end = grid.block_interval(piece.start)
        start = piece.start if first == piece.start else first_end
        last, last_end = grid.block_interval(piece.end - 1)
        end = piece.end if last_end == piece.end else last
        if start < end:
            self._copy(span_index, piece, start, end)

    def rebuild(self, span_index: int, start: int, end: int, pieces: Sequence[_Piece]) -> bool:
        """Fill the fragment (or whole block) [start, end); returns whether it was cut in another way before."""
        if len(pieces) == 1 and _fragment(pieces[0], start) == (start, end):
            self._copy(span_index, pieces[0], start, end)
            return False
        error = torch.zeros(1, end - start)
        config = self.layout.config
        entries: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(config.window_size)]
        for piece in pieces:
            overlap = max(start, piece.start), min(end, piece.end)
            self._read_fragment(piece, start, overlap, error, entries)
        slices = self.layout.state_slices(span_index, start, end)
        if config.ef_bits:
            encoded = encode_error(error, bits=config.ef_bits, bucket_size=config.bucket_size)
            for name, new in zip(ERROR_TENSORS, encoded, strict=True):
                if new is not None:
                    self.state[name][slices[name]] = new[0]
        if self.layout.has_window:
            fitted = [_fit_slot(*found, config.num_kept(end - start)) for found in entries]
            indices, values = (torch.stack(parts) for parts in zip(*fitted, strict=True))
            window = encode_slot(indices, values, config.packed_window)
            for stored, part in zip(_window(self.state, slices, len(entries)), window, strict=True):
                if stored is not None and part is not None:
                    stored.copy_(part)
        return True

    def _copy(self, span_index: int, piece: _Piece, start: int, end: int) -> None:
        """Copy [start, end): whole blocks, or a fragment with the same ends on both sides."""
        source = piece.shard.state
        assert source is not None  # callers pass pieces with state only
        ours = self.layout.state_slices(span_index, start, end)
        theirs = piece.shard.layout.state_slices(piece.span_index, start, end)
        shift = (self.step - int(source["step"])) % self.layout.config.window_size
        for name in ours:
            new = source[name][theirs[name]]
            if shift and name in WINDOW_TENSORS:
                new = self._shift_slots(piece, start, end, name, shift)
            self.state[name][ours[name]] = new

    def _shift_slots(self, piece: _Piece, start: int, end: int, name: str, shift: int) -> Tensor:
        """The source's window of the blocks in [start, end), every slot moved by ``shift`` places."""
        assert piece.shard.state is not None  # callers pass pieces with state only
        shifted = []
        while start < end:
            block_end = min(end, self.layout.grid(piece.span).block_interval(start)[1])
            block = piece.shard.layout.state_slices(piece.span_index, start, block_end)[name]
            slots = piece.shard.state[name][block].view(self.layout.config.window_size, -1)
            shifted.append(slots.roll(shift, dims=0).flatten())
            start = block_end
        return torch.cat(shifted)

    def _read_fragment(
        self,
        piece: _Piece,
        start: int,
        overlap: tuple[int, int],
        error: Tensor,
        entries: list[tuple[list[Tensor], list[Tensor]]],
    ) -> None:
        """Add what a source fragment has in ``overlap`` to the error and, slot by slot, to the entries.

        Args:
            piece: The source.
            start: First element of the fragment that is rebuilt; indices are counted from it.
            overlap: The ends of what is taken.
            error: (1, numel) fp32.
            entries: Indices and values by slot of the target.
        """
        layout, state = piece.shard.layout, piece.shard.state
        assert state is not None  # callers pass pieces with state only
        first, end = _fragment(piece, overlap[0])
        slices = layout.state_slices(piece.span_index, first, end)
        bits, bucket_size = layout.config.ef_bits, layout.config.bucket_size
        if bits:
            stored = StoredError.of({name: state[name][slices[name]][None] for name in ERROR_TENSORS if name in slices})
            decoded = decode_error(stored, end - first, bits=bits, bucket_size=bucket_size)
            error[:, overlap[0] - start : overlap[1] - start] = decoded[:, overlap[0] - first : overlap[1] - first]
        if layout.has_window:
            indices, values = decode_slot(_window(state, slices, len(entries)))
            for slot in range(len(entries)):
                position = indices[slot] + first
                taken = (values[slot] != 0) & (position >= overlap[0]) & (position < overlap[1])
                target_slot = (slot + self.step - int(state["step"])) % len(entries)
                entries[target_slot][0].append(position[taken] - start)
                entries[target_slot][1].append(values[slot][taken])


def _window(state: Mapping[str, Tensor], slices: Mapping[str, slice], num_slots: int) -> Slot:
    """Views of one block's window: its slots take the place of the blocks of a `Slot`."""
    parts = {name: state[name][slices[name]].view(num_slots, -1) for name in WINDOW_TENSORS if name in slices}
    return Slot(parts["indices"], parts["values"], parts.get("scales"))


def _fit_slot(indices: Sequence[Tensor], values: Sequence[Tensor], num_kept: int) -> tuple[Tensor, Tensor]:
    """Exactly ``num_kept`` entries, indices ascending: the largest magnitudes, or all and empty places.

    Returns:
        Indices int64 and values fp32.
    """
    index, value = torch.cat(list(indices)), torch.cat(list(values))
    order = index.argsort()
    index, value = index[order], value[order]
    if len(index) > num_kept:
        largest = value.abs().argsort(descending=True, stable=True)[:num_kept].sort().values
        return index[largest], value[largest]
    unused = torch.ones(num_kept, dtype=torch.bool)
    unused[index[index < num_kept]] = False  # at least as many as there are places to fill
    empty = unused.nonzero().flatten()[: num_kept - len(index)]
    index, value = torch.cat([index, empty]), torch.cat([value, value.new_zeros(len(empty))])
    order = index.argsort()
    return index[order], value[order]


def _fragment(piece: _Piece, position: int) -> tuple[int, int]:
    """Ends of the source's block or fragment that holds the element at ``position``."""
    start, end = piece.shard.layout.grid(piece.span).block_interval(position)
    return max(start, piece.span.start), min(end, piece.span.start + piece.span.numel)


def _cut_fragments(layout: StateLayout, span: ShardSpan, pieces: Sequence[_Piece]) -> list[tuple[int, int]]:
    """The span's part of every block that is not wholly inside one piece."""
    fragments = set()
    for piece in pieces:
        for position in (piece.start, piece.end - 1):
            start, end = layout.grid(span).block_interval(position)
            if start < piece.start or end > piece.end:
                fragments.add((max(start, span.start), min(end, span.start + span.numel)))
    return sorted(fragments)


def _require_equal_copies(pieces: Sequence[_Piece]) -> None:
    """Pieces of one parameter, sorted by their start, must be equal where they overlap."""
    longest = pieces[0]  # holds all elements from a piece's start on that any piece before it holds
    for piece in pieces[1:]:
        if piece.start < longest.end and (name := _difference(longest, piece)):
            raise CheckpointMismatchError(
                f"elements {piece.start} to {min(piece.end, longest.end)} of parameter {piece.span.fqn!r} are in "
                f"{longest.shard.origin} and in {piece.shard.origin} with different contents ({name}): ranks had "
                "different parameters under one name, or files of several checkpoints are mixed. Load it with what "
                "saved it, on the same number of ranks."
            )
        longest = max(longest, piece, key=lambda p: p.end)


def _difference(a: _Piece, b: _Piece) -> str | None:
    """What differs where both pieces are; None if nothing does. ``a`` starts first.

    Blocks that are cut in other places have another state: on the Top-K path it is compared if both have the same ends.
    """
    if a.span.global_shape != b.span.global_shape:
        return "shape"
    start, end = b.start, min(a.end, b.end)
    one, other = (piece.shard.weights[_slice(piece.span.offset - piece.span.start, start, end)] for piece in (a, b))
    if one.dtype != other.dtype or not same_bits(one, other):
        return "weights"
    first, second = a.shard.state, b.shard.state
    if first is None or second is None:
        return "step" if first is not second else None
    if int(first["step"]) != int(second["step"]):
        return "step"
    if not a.span.is_dense and (a.start, a.end) != (b.start, b.end):
        return None
    if name := structural_difference(a.shard.layout.config.structural, b.shard.layout.config.structural):
        return name
    ours, theirs = (_state_slices(piece, start, end) for piece in (a, b))
    return next((name for name in ours if not same_bits(first[name][ours[name]], second[name][theirs[name]])), None)


def _state_slices(piece: _Piece, start: int, end: int) -> dict[str, slice]:
    """Where the state of [start, end) lies, on either path."""
    if piece.span.is_dense:
        return dict.fromkeys(DENSE_TENSORS, _slice(_moments_offset(piece), start, end))
    return piece.shard.layout.state_slices(piece.span_index, start, end)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaN, which DeepSpeed's padding may hold: it is memory as it was found."""
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)))


def _moments_offset(piece: _Piece) -> int:
    """Where position 0 of the piece's parameter, on the dense path, would be among the moments of its shard."""
    return sum(s.numel for s in piece.shard.layout.spans[: piece.span_index] if s.is_dense) - piece.span.start


def _copy_moments(piece: _Piece, state: Mapping[str, Tensor], offset: int) -> None:
    """Copy the piece's moments to where position 0 of the parameter would be at ``offset``."""
    assert piece.shard.state is not None  # callers pass pieces with state only
    source = _slice(_moments_offset(piece), piece.start, piece.end)
    for name in DENSE_TENSORS:
        state[name][_slice(offset, piece.start, piece.end)] = piece.shard.state[name][source]


def _slice(offset: int, start: int, end: int) -> slice:
    return slice(offset + start, offset + end)


def _require_same_settings(shard: SourceShard, layout: StateLayout, fqn: str) -> None:
    theirs, ours = shard.layout.config.structural, layout.config.structural
    if name := structural_difference(theirs, ours):
        raise CheckpointMismatchError(
            f"parameter {fqn!r} was trained with {name}={theirs[name]} in {shard.origin}, this optimizer has "
            f"{ours[name]}. State cannot be converted; construct the optimizer with {name}={theirs[name]}."
        )
