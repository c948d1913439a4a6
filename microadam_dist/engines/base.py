"""How the optimizer learns what a local tensor holds, without knowing any engine."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor

from ..errors import CheckpointMismatchError, ConfigError, UnsupportedLayoutError
from ..layout import ShardSpan


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter as the optimizer's constructor saw it.

    It is not kept alive: where an engine has put a shard in its place, its memory must be free to go.

    Attributes:
        fqn: Its name, or its position in the param groups.
        shape: Its shape at that time.
        reference: Gives the tensor, or None when nothing else holds it any more.
    """

    fqn: str
    shape: tuple[int, ...]
    reference: Callable[[], Tensor | None]

    @classmethod
    def of(cls, fqn: str, param: Tensor) -> NamedParameter:
        """A name and what it stands for."""
        return cls(fqn, tuple(param.shape), weakref.ref(param))

    @property
    def param(self) -> Any:
        """The tensor itself; None when nothing else holds it any more."""
        return self.reference()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_named, (self.fqn, self.shape, self.param)


def _restore_named(fqn: str, shape: tuple[int, ...], param: Tensor | None) -> NamedParameter:
    return NamedParameter(fqn, shape, (lambda: None) if param is None else weakref.ref(param))


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
        exchange: A `row_exchange.RowExchange` where state is sharded over parameters that are whole on every rank.
    """

    tensor: Tensor
    group: int
    position: int
    group_size: int
    constructed: Sequence[Sequence[NamedParameter]]
    exchange: Any = None


@dataclass(frozen=True, eq=False)
class Shard:
    """A tensor in the param groups: what it holds and how its data is reached. This one is a plain tensor.

    Attributes:
        tensor: The tensor in the param groups.
        spans: The intervals of the model's parameters that lie in its local data.
        local_shape: Shape of the local data when it was found.
    """

    tensor: Tensor
    spans: tuple[ShardSpan, ...]
    local_shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "local_shape", tuple(self.param.shape))

    @property
    def name(self) -> str:
        """The parameter, or the parameters, it holds; for messages."""
        return ", ".join(span.fqn for span in self.spans)

    @property
    def param(self) -> Tensor:
        """This rank's data; not a copy. To be used without autograd."""
        return self.tensor

    @property
    def grad(self) -> Tensor:
        """This rank's gradient, with the elements of `param`.

        Raises:
            UnsupportedLayoutError: The gradient is sparse, or distributed in another way than the parameter.
        """
        grad = self.tensor.grad
        assert grad is not None  # callers ask for tensors that have one
        if grad.is_sparse:
            raise UnsupportedLayoutError(
                f"parameter {self.name!r} of shape {tuple(self.tensor.shape)} has a sparse gradient; "
                "use an embedding with sparse=False."
            )
        return grad

    @property
    def has_final_grad(self) -> bool:
        """Whether a gradient is complete when the backward pass has accumulated it, with no reduction to follow."""
        return process_rank()[1] == 1

    @property
    def may_be_probed(self) -> bool:
        """Whether a first step with zero gradients may be a probe for the state instead of a step of the training.

        Not under ZeRO: DeepSpeed does not probe there, and a rank may hold nothing but rows of an embedding that saw
        no token, while the other ranks have gradients and count the step.
        """
        return tuple(self.tensor.shape) == self.spans[0].global_shape if self.spans else False

    @property
    def is_saved_apart(self) -> bool:
        """Whether a state dict must not hold the state, because the engine's own checkpoints would fail on it."""
        return False

    @property
    def saved_spans(self) -> tuple[ShardSpan, ...]:
        """What the state tensors as `wrap` makes them describe."""
        return self.spans

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that step the same parameters at the same time, as far as it matters to the engine."""
        return []

    def is_other_rank_part(self, state: Any) -> bool:
        """Whether a state tensor is what another rank has under this name: one rank has saved, and all have loaded."""
        return False

    @property
    def sharding_group(self) -> dist.ProcessGroup | None:
        """The ranks each of which holds another part of its parameters; None where this rank holds them whole."""
        return None

    def wrap(self, local: Tensor) -> Tensor:
        """A tensor with one row for each row of `param`, in the form in which state is kept and saved."""
        return local

    def unwrap(self, state: Tensor) -> Tensor:
        """The opposite of `wrap`: this rank's part of a state tensor, not a copy.

        Raises:
            CheckpointMismatchError: It is distributed in another way than the parameter.
        """
        if type(state) is not Tensor and hasattr(state, "placements"):
            raise CheckpointMismatchError(
                f"state of {self.name!r} is a DTensor with placements {state.placements}, the parameter a "
                "plain tensor. Load it with torch.distributed.checkpoint, which reshards."
            )
        return state


@dataclass
class ExchangedBytes:
    """What this rank has handed to the collectives that pass its new weights on, so far.

    Counted with ``sparse_allgather`` or ``shard_state``; every collective counts once, whatever the number of
    receivers.

    Attributes:
        sent: With padding, headers and dense gathers.
        dense: What it would have been with dense gathers alone.
    """

    sent: int = 0
    dense: int = 0


class Engine(Protocol):
    """An adapter module."""

    def find_shard(self, slot: Slot) -> Shard | None:
        """What the tensor in ``slot`` holds, or None when it is not this engine's.

        Raises:
            UnsupportedLayoutError: It is this engine's, sharded in a way that has no spans.
        """

    def whitelist(self, optimizer_class: type) -> None:
        """Make the engine accept the class; called when an optimizer is constructed."""


# Asked in this order; the modules import their engine lazily.
_ENGINES = ("ddp", "dtensor", "fsdp1", "local", "deepspeed")


def engines() -> list[Engine]:
    """All adapters, in the order in which they are asked."""
    return [cast(Engine, importlib.import_module(f".{name}", __package__)) for name in _ENGINES]


def find_shard(slot: Slot) -> Shard:
    """What the tensor in ``slot`` holds, from the engine it belongs to.

    Raises:
        UnsupportedLayoutError: No engine knows the tensor, or its engine shards it in a way that has no spans.
    """
    for engine in engines():
        shard = engine.find_shard(slot)
        if shard is not None:
            return shard
    raise UnsupportedLayoutError(
        f"param group {slot.group} holds a tensor of shape {tuple(slot.tensor.shape)} at position {slot.position} that "
        "is neither a parameter the optimizer was constructed with nor a shard of a known engine. Construct MicroAdam "
        "with the model's own parameters, and let the engine (DeepSpeed, FSDP2) replace them."
    )


def row_exchange(shard_state: Any, weight_exchange: str, counted: ExchangedBytes) -> Any:
    """How ranks that share the state of replicated parameters pass new weights on; None where they do not.

    Args:
        shard_state: Setting of the optimizer: false, true, a process group or a DeviceMesh.
        weight_exchange: Setting of the optimizer: a name.
        counted: Counts what this rank sends.

    Raises:
        ConfigError: A setting is invalid, or there are no ranks.
    """
    names = {"touched": "TouchedExchange", "newest": "NewestExchange"}
    if weight_exchange not in names:
        raise ConfigError(f"weight_exchange={weight_exchange!r}: expected {' or '.join(map(repr, names))}.")
    if shard_state is None or shard_state is False:
        return None
    module = importlib.import_module(".row_exchange", __package__)
    return getattr(module, names[weight_exchange])(shard_state, counted)


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


def any_rank(flag: bool, shards: Iterable[Shard]) -> bool:
    """Whether ``flag`` is set on any rank that steps the same parameters; a collective of the shards' groups."""
    for group in dict.fromkeys(group for shard in shards for group in shard.groups):
        flags = [flag] * group.size()
        dist.all_gather_object(flags, flag, group=group)
        flag = any(flags)
    return flag


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
