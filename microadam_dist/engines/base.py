"""How the optimizer learns what a local tensor holds, without knowing any engine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointMismatchError, UnsupportedLayoutError
from ..layout import ShardSpan


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the optimizer's constructor saw it."""

    fqn: str
    param: Tensor


@dataclass(frozen=True)
class Slot:
    """A place in the param groups: what the constructor saw there and what is there now.

    Engines put other tensors into the groups between construction and the first step.

    Attributes:
        tensor: The local tensor that is stepped now.
        group: Its param group, by position.
        position: Its position in the group.
        group_size: Number of tensors in the group now.
        constructed: What the constructor got, group by group.
    """

    tensor: Tensor
    group: int
    position: int
    group_size: int
    constructed: Sequence[Sequence[NamedParameter]]


class Engine(Protocol):
    """An adapter module."""

    def find_spans(self, slot: Slot) -> tuple[ShardSpan, ...] | None:
        """The spans of the tensor in ``slot``, or None when it is not this engine's.

        Raises:
            UnsupportedLayoutError: It is this engine's, sharded in a way that has no spans.
        """

    def whitelist(self, optimizer_class: type) -> None:
        """Make the engine accept the class; called when an optimizer is constructed."""


# Asked in this order; the modules import their engine lazily.
_ENGINES = ("local", "deepspeed")


def engines() -> list[Engine]:
    """All adapters, in the order in which they are asked."""
    return [cast(Engine, importlib.import_module(f".{name}", __package__)) for name in _ENGINES]


def find_spans(slot: Slot) -> tuple[ShardSpan, ...]:
    """The spans of the tensor in ``slot``, from the engine it belongs to.

    Raises:
        UnsupportedLayoutError: No engine knows the tensor, or its engine shards it in a way that has no spans.
    """
    for engine in engines():
        spans = engine.find_spans(slot)
        if spans is not None:
            return spans
    raise UnsupportedLayoutError(
        f"param group {slot.group} holds a tensor of shape {tuple(slot.tensor.shape)} at position {slot.position} that "
        "is neither a parameter the optimizer was constructed with nor a shard of a known engine. Construct MicroAdam "
        "with the model's own parameters, and let the engine (DeepSpeed, DDP) replace them."
    )


@contextlib.contextmanager
def raise_together() -> Iterator[None]:
    """If the body raises on any rank, raise on every rank: none goes on alone, or waits for one that is gone."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    messages: list[str | None] = [None] * process_rank()[1]
    if len(messages) > 1:
        dist.all_gather_object(messages, None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise CheckpointMismatchError(f"rank {rank}: {message}")


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
