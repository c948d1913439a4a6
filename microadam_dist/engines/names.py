"""What the parameters of an optimizer are called: the one answer, for all engines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..layout import plain_fqn


@dataclass(frozen=True, eq=False)
class NamedParameter:
    """A parameter as the optimizer's constructor saw it.

    It is not kept alive: where an engine has put a shard in its place, its memory must be free to go.

    Attributes:
        fqn: Its name, without what wrappers of the model add, or its position in the param groups.
        shape: Its shape at that time.
        reference: Gives the tensor, or None when nothing else holds it any more.
    """

    fqn: str
    shape: tuple[int, ...]
    reference: Callable[[], Tensor | None]

    @property
    def param(self) -> Any:
        """The tensor itself; None when nothing else holds it any more."""
        return self.reference()

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.fqn, self.shape, self.param)


def named(fqn: str, shape: tuple[int, ...], param: Tensor | None) -> NamedParameter:
    """A name and what it stands for."""
    return NamedParameter(fqn, shape, (lambda: None) if param is None else weakref.ref(param))


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and those of its buffers that are saved, by the names that spans have; tied ones by each name."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in owner._non_persistent_buffers_set:
                tensors[name] = buffer
    return {plain_fqn(name): tensor for name, tensor in tensors.items()}


class ParameterNames:
    """The parameters an optimizer was constructed with.

    Attributes:
        groups: Group by group, in order.
        sharded: Those that an engine has sharded while others were frozen, likewise; None until it says so. What is
            frozen or thawed later is not moved by it.
    """

    def __init__(self) -> None:
        self.groups: list[list[NamedParameter]] = []
        self.sharded: list[list[NamedParameter]] | None = None
        self._by_id: dict[int, NamedParameter] = {}

    def add_group(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        """The names of a new param group's parameters."""
        taken = {named.fqn for named in chain.from_iterable(self.groups)}
        group = []
        for name, param in zip(names, params, strict=True):
            plain = plain_fqn(name)
            group.append(named(name if plain in taken else plain, tuple(param.shape), param))
            taken.add(group[-1].fqn)
        self.groups.append(group)
        self._index()

    def rename(self, names: Mapping[Tensor, str]) -> None:
        """Give parameters these names, without what wrappers add; those that are not in ``names`` keep theirs."""
        for group in self.groups:
            group[:] = [replace(named, fqn=names.get(named.param, named.fqn)) for named in group]
        self._index()

    def take_from(self, module: nn.Module) -> None:
        """Call parameters as the model does, instead of by their positions."""
        self.rename({param: plain_fqn(name) for name, param in module.named_parameters()})

    def record_sharded(self) -> None:
        """An engine shards those that require a gradient now."""
        self.sharded = [
            [named for named in group if named.param is not None and named.param.requires_grad] for group in self.groups
        ]

    def find(self, tensor: Tensor) -> NamedParameter | None:
        """What a tensor is called; None if the constructor did not see it."""
        named = self._by_id.get(id(tensor))
        return named if named is not None and named.param is tensor else None

    def _index(self) -> None:
        self._by_id = {id(named.param): named for named in chain.from_iterable(self.groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()  # ids are of the process that pickled it
