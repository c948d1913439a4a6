"""State that others put into ``optimizer.state``: whose it is, and whether it is still what was checked."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..arithmetic.state import OWN_NAMES


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
        p: The parameter; they are recognised on this device only.
        state: Its state.
        names: Keys of it beside ``step``; what has other keys is not looked at.
    """

    def __init__(self, p: Tensor, state: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._device = p.device
        self._select = operator.itemgetter("step", "step", *names)  # twice: one key alone would not give a tuple
        tensors = self._select(state)
        self._ids = ids = list(map(id, tensors))
        self._alive = [weakref.ref(tensor, lambda _: ids.clear()) for tensor in tensors]

    def is_in(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether all of them are still there."""
        try:
            return list(map(id, self._select(state))) == self._ids and p.device == self._device
        except KeyError:
            return False
