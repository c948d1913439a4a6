"""What ranks agree about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch.distributed as dist

from ..errors import CheckpointMismatchError


def process_rank() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def any_rank(flag: bool, groups: Iterable[dist.ProcessGroup]) -> bool:
    """Whether ``flag`` is set on any rank; a collective of each of the groups."""
    for group in dict.fromkeys(groups):
        flags = [flag] * group.size()
        dist.all_gather_object(flags, flag, group=group)
        flag = any(flags)
    return flag


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
