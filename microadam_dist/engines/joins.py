"""Uneven inputs, ``with ddp.join():``, where a rank that has run out of them does not step.

DDP answers for such a rank while the others go on, a `row_exchange` cannot: the others would wait for it for ever.
"""

from __future__ import annotations

import functools
from typing import Any

from ..errors import ConfigError

_open: set[Any] = set()  # the join contexts that this process is in


@functools.cache
def watch_joins() -> None:
    """Note from now on which join contexts are entered; torch itself does not say where it is in one."""
    from torch.distributed.algorithms import join as torch_join

    contexts: Any = torch_join.Join
    enter, leave = contexts.__enter__, contexts.__exit__

    @functools.wraps(enter)
    def watched_enter(join: Any) -> Any:
        if join._enable:
            _open.add(join)
        return enter(join)

    @functools.wraps(leave)
    def watched_leave(join: Any, *error: Any) -> Any:
        _open.discard(join)
        return leave(join, *error)

    contexts.__enter__, contexts.__exit__ = watched_enter, watched_leave


def require_no_join() -> None:
    """For a step that all ranks take together.

    Raises:
        ConfigError: The process is in a join context.
    """
    if _open:
        raise ConfigError(
            "shard_state does not work under ddp.join(): a rank that has run out of inputs no longer steps, and the "
            "others would wait for its rows. Give every rank the same number of batches (DistributedSampler does) and "
            "remove join(), or remove shard_state."
        )
