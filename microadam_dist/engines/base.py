"""The seam between the optimizer and the engines: what a local tensor holds, and how new weights reach other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor

from ..config import MicroAdamConfig, check_flag
from ..errors import ConfigError, UnsupportedLayoutError
from ..layout import WINDOW_TENSORS, ShardSpan, StateLayout
from .dtensors import is_dtensor, require_plain
from .names import ParameterNames

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Place:
    """A place in the param groups; engines put other tensors there between construction and the first step.

    Attributes:
        tensor: The local tensor that is stepped now.
        group: Its param group, by position.
        position: Its position in the group.
        group_size: Number of tensors in the group now.
        names: What the constructor got.
        exchange: Where state is sharded over parameters that are whole on every rank.
    """

    tensor: Tensor
    group: int
    position: int
    group_size: int
    names: ParameterNames
    exchange: WeightExchange | None = None

    def refuse_shard_state(self, fqn: str) -> None:
        """For parameters that their engine shards, and their state with them."""
        if self.exchange is not None:
            raise UnsupportedLayoutError(
                f"parameter {fqn!r} is sharded by FSDP, and its state with it: remove shard_state, which is for "
                "parameters that are whole on every rank (DDP)."
            )


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
        return False

    @property
    def may_be_probed(self) -> bool:
        """Whether a first step with zero gradients may be a probe for the state instead of a step of the training."""
        return True

    @property
    def is_saved_apart(self) -> bool:
        """Whether a state dict must not hold the state, because the engine's own checkpoints would fail on it."""
        return False

    @property
    def is_exchanged(self) -> bool:
        """Whether other ranks step other rows of it, and all get them by a `WeightExchange`."""
        return False

    @property
    def saved_spans(self) -> tuple[ShardSpan, ...]:
        """What the state tensors as `wrap` makes them describe."""
        return self.spans

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that step the same parameters at the same time, as far as it matters to the engine."""
        return []

    @property
    def has_plain_state(self) -> bool:
        """Whether `wrap` and `unwrap` change nothing."""
        return True

    def is_other_part(self, state: Any) -> bool:
        """Whether a state tensor is a part that is not this rank's: one rank has saved, and other ranks have loaded."""
        return isinstance(state, Tensor) and is_dtensor(state)

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
        return require_plain(state, self.name)


class Adapter(Protocol):
    """The module of an engine."""

    def find_shard(self, place: Place) -> Shard | None:
        """What the tensor in ``place`` holds, or None when it is not this engine's.

        Raises:
            UnsupportedLayoutError: It is this engine's, sharded in a way that has no spans.
        """


# ---------------------------------------------------------------- new weights for other ranks


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


ShardState: TypeAlias = "bool | dist.ProcessGroup | DeviceMesh | None"  # see `MicroAdam`


@dataclass(frozen=True)
class ExchangeSettings:
    """How new weights reach other ranks, as the user has set it; see `MicroAdam`.

    Raises:
        ConfigError: ``sparse_allgather`` is no bool, or ``weight_exchange`` is given without ``shard_state``.
    """

    sparse_allgather: bool = False
    shard_state: ShardState = False
    weight_exchange: str | None = None

    def __post_init__(self) -> None:
        check_flag("sparse_allgather", self.sparse_allgather)
        if self.weight_exchange is not None and not self.shards_state:
            raise ConfigError(
                f"weight_exchange={self.weight_exchange!r} is given without shard_state, so no weights are exchanged: "
                "add shard_state=True (under DDP), or remove it."
            )

    @property
    def shards_state(self) -> bool:
        """Whether the state of replicated parameters is shared by several ranks."""
        return self.shard_state is not None and self.shard_state is not False


class Rows(NamedTuple):
    """What there is to know about an exchanged parameter before its step.

    Attributes:
        shard: The parameter; ``is_exchanged``.
        layout: Of this rank's rows.
        state: Local state tensors, (rows, n).
        step: Steps taken before.
    """

    shard: Shard
    layout: StateLayout
    state: Mapping[str, Tensor]
    step: int

    @property
    def tensor(self) -> Tensor:
        """The whole parameter."""
        return self.shard.tensor

    @property
    def window(self) -> dict[str, Tensor]:
        """Its tensors; empty where none is stored."""
        return {name: self.state[name] for name in WINDOW_TENSORS if name in self.state}


class Replayed(NamedTuple):
    """Weights that are updated from a window alone, which other ranks have filled.

    Attributes:
        weights: The whole parameter, in whatever order it lies in memory.
        window: The window's tensors of the blocks in ``layout``.
        layout: The rows that are updated.
        step: Steps taken before.
    """

    weights: Tensor
    window: Mapping[str, Tensor]
    layout: StateLayout
    step: int


Update = Callable[[Sequence[Tensor]], int | Tensor]  # steps this rank's rows of parameters; returns the skipped blocks
Replay = Callable[[Sequence[Replayed]], object]


class WeightExchange(Protocol):
    """Makes parameters whole on every rank again, after each has stepped its rows."""

    def check(self, config: MicroAdamConfig) -> None:
        """Raise a ConfigError for settings that cannot be exchanged."""

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks, for parameters on such a device."""

    def forget(self, tensor: Tensor) -> None:
        """The state of a parameter was replaced."""

    @property
    def replica_bytes(self) -> int:
        """Bytes of state kept of rows that other ranks step."""

    def step(self, rows: Sequence[Rows], config: MicroAdamConfig, update: Update, replay: Replay) -> int | Tensor:
        """Step the parameters of one param group on all ranks; returns the blocks this rank has skipped.

        Args:
            rows: The parameters.
            config: The settings of this step.
            update: Steps this rank's rows of parameters.
            replay: Updates weights from a window.

        Raises:
            ConfigError: The ranks are about to take different steps. Nothing has been changed, on any rank.
        """


class ExchangingOptimizer(Protocol):
    """What an adapter may ask of the optimizer it is given."""

    names: ParameterNames
    exchange_settings: ExchangeSettings
    exchanged_bytes: ExchangedBytes


class ShardStates(Protocol):
    """The state of an optimizer's tensors; see `optimizer.sharded_state`."""

    def layouts(self) -> Mapping[Tensor, StateLayout]:
        """What each tensor in the param groups holds, whether it has state yet or not."""

    def flat_state(self, p: Tensor) -> Mapping[str, Tensor] | None:
        """The state tensors of one of them, flat, not copies; None when it has none."""

    def made_state(self, p: Tensor) -> Mapping[str, Tensor]:
        """The same, of zeros when it had none."""


class StatefulOptimizer(Protocol):
    """What an adapter may ask about state."""

    names: ParameterNames

    @property
    def sharded(self) -> ShardStates:
        """The state of its tensors."""
