"""Intervals of parameters: what a local tensor holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedLayoutError

# Parameters below these global sizes take the dense path (AdamW with fp32 moments).
MIN_SPARSE_ROW_NUMEL = 64
MIN_SPARSE_NUMEL = 4096

# What wrappers add to the names of a model's parameters: compiling, activation checkpointing, FSDP1.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def plain_fqn(fqn: str) -> str:
    """The name of a parameter in the model itself, whatever is wrapped around the model or its modules."""
    for wrapper in _WRAPPERS:
        fqn = fqn.replace(wrapper, "")
    return fqn.removeprefix("module.")  # DDP


def are_positions(names: Sequence[str]) -> bool:
    """Whether names say nothing but positions in the param groups: the parameters were given without names."""
    return all(name == str(position) for position, name in enumerate(names))


@dataclass(frozen=True)
class ShardSpan:
    """A contiguous interval of one named parameter, in row-major element order, inside a local tensor.

    Args:
        fqn: Name of the parameter, or its position in the param groups when it was given without a name.
        global_shape: Shape of the whole parameter.
        start: First element of the interval, counted in the whole parameter.
        numel: Length of the interval; may be 0.
        offset: Where the interval begins in the local tensor, in elements.
    """

    fqn: str
    global_shape: tuple[int, ...]
    start: int
    numel: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or self.numel < 0 or self.offset < 0 or self.start + self.numel > self.global_numel:
            raise UnsupportedLayoutError(f"{self} does not lie inside the parameter.")

    @classmethod
    def whole(cls, fqn: str, global_shape: tuple[int, ...]) -> ShardSpan:
        """All of a parameter."""
        return cls(fqn, global_shape, start=0, numel=math.prod(global_shape))

    @property
    def origin(self) -> int:
        """What to add to the place of an element in the local tensor to get its position in the parameter."""
        return self.start - self.offset

    @property
    def global_numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.global_shape)

    @property
    def row_numel(self) -> int:
        """Elements of one row of the parameter."""
        return math.prod(self.global_shape[1:])

    @property
    def has_whole_rows(self) -> bool:
        """Whether the interval begins and ends at a row of the parameter."""
        return all(not edge or edge % self.row_numel == 0 for edge in (self.start, self.numel))

    @property
    def is_dense(self) -> bool:
        """Whether the parameter takes the dense path; decided by its global shape, so the same on every rank."""
        if len(self.global_shape) < 2 or self.global_numel < MIN_SPARSE_NUMEL:
            return True
        return self.global_numel // self.global_shape[0] < MIN_SPARSE_ROW_NUMEL
