"""What others may change between steps, state and settings: whose it is, and whether it is still what was checked."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping
from itertools import repeat
from typing import Any

from torch import Tensor

from ..arithmetic.state import OWN_NAMES
from ..config import READ_NAMES, MicroAdamConfig
from ..engines.base import Shard
from ..layout import StateLayout


def is_ours(state: Any) -> bool:
    """Whether it is state of MicroAdam, in whatever condition."""
    return isinstance(state, Mapping) and not OWN_NAMES.isdisjoint(state)


def is_others(state: Any) -> bool:
    """Whether it is what wrappers of optimizers (Lookahead, ...) keep for a parameter that has not been stepped."""
    return isinstance(state, Mapping) and bool(state) and OWN_NAMES.isdisjoint(state)


class CheckedState:
    """The state tensors of a parameter as they were when they were checked, to be recognised at every step.

    By their ids, because to touch more of each takes longer; an id is not taken again as long as its tensor lives, and
    nothing is recognised any more once one of them is gone. They are not kept alive.

    Args:
        shard: The parameter; they are recognised on this device only.
        layout: What they fit; of keys, beside ``step``. What has other keys is not looked at.
        state: Its state.
    """

    def __init__(self, shard: Shard, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        self.shard, self.layout = shard, layout
        self._device = shard.tensor.device
        self._select = operator.itemgetter("step", "step", *layout.tensors)  # twice: one alone would not give a tuple
        tensors = self._select(state)
        self._ids = ids = list(map(id, tensors))
        self._alive = [weakref.ref(tensor, lambda _: ids.clear()) for tensor in tensors]

    def is_in(self, state: Any) -> bool:
        """Whether all of them are still there."""
        try:
            return list(map(id, self._select(state))) == self._ids and self.shard.tensor.device == self._device
        except (KeyError, TypeError):  # no state, or none of ours
            return False


class CheckedSettings:
    """The settings of one param group, validated when one of them is another object than before.

    What equals a valid setting may be none: True is no window size of 1. Nothing is recognised where a setting can
    change in place (a list, a tensor).
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[Any, ...], MicroAdamConfig] | None = None

    def __reduce__(self) -> tuple[type[CheckedSettings], tuple[()]]:
        return CheckedSettings, ()  # a copy of the objects would never be met again

    def config(self, group: Mapping[str, Any]) -> MicroAdamConfig:
        """The settings of ``group``.

        Raises:
            ConfigError: As `MicroAdamConfig.from_dict`.
        """
        values, known = tuple(map(group.get, READ_NAMES, repeat(_ABSENT))), self._known
        if known is not None and all(map(operator.is_, values, known[0])):
            return known[1]
        config = MicroAdamConfig.from_dict(group)
        if all(map(_stays, values)):
            self._known = values, config
        return config


_ABSENT = object()


def _stays(value: Any) -> bool:
    """Whether a setting cannot change but by another object in its place."""
    if type(value) is tuple:
        return all(map(_stays, value))
    return value is None or value is _ABSENT or isinstance(value, (int, float, str))
