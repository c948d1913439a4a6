"""What a training has saved, whichever engine trained: weights and state by (parameter, interval)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..layout import StateLayout


class SavedWeights(Protocol):
    """Where weights are found by (parameter, interval); a `Resharder` is one."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, by name."""

    def whole(self, fqn: str) -> Tensor:
        """All of a tensor, in the dtype in which it was saved."""

    def weights(self, layout: StateLayout, out: Tensor) -> None:
        """Fill the spans of the local tensor ``out`` (flat); the elements between them stay as they are."""


SavedStates = Callable[[Sequence[StateLayout]], list[dict[str, Tensor] | None]]
"""Gives the state of local tensors with these layouts, flat, on the CPU; None for one that was never stepped."""


@dataclass(frozen=True)
class SavedTraining:
    """What a training has saved.

    Attributes:
        origin: Where it was read from, for messages.
        engine: What trained, for messages.
        weights: Of the whole model.
        states: Of any local tensors.
        param_groups: Their settings.
        scheduler: State dict of the learning rate's scheduler; None where there was none.
    """

    origin: Path
    engine: str
    weights: SavedWeights
    states: SavedStates
    param_groups: Sequence[Mapping[str, Any]]
    scheduler: dict[str, Any] | None


Read = Callable[[tuple[int, int]], SavedTraining]
"""Reads it, given (rank, number of ranks) of those that share the work of comparing files with their checksums."""
