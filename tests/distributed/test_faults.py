"""A rank that dies: the others do not wait for it, and say so."""

from __future__ import annotations

import os
from multiprocessing.connection import wait
from typing import Any

import pytest
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from microadam_dist import MicroAdam
from tests.ranks import receive, started_ranks

from .models import SETTINGS, GivenGradients, backward


def _dies_before_the_step(rank: int, world_size: int, engine: str) -> None:
    model: Any = GivenGradients()
    if engine == "ddp":
        model = DistributedDataParallel(model)
        optimizer = MicroAdam(model.named_parameters(), **SETTINGS, shard_state=True)
    else:
        fully_shard(model)
        optimizer = MicroAdam(model.named_parameters(), **SETTINGS)
    for step in range(3):
        backward(model, step)
        if rank == 1 and step == 2:
            os._exit(9)
        optimizer.step()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_others_end_with_an_error(engine: str) -> None:
    """In the step, where ranks exchange weights; else in the next collective."""
    with started_ranks(_dies_before_the_step, 2, engine) as (_, pipes):
        assert wait(pipes[:1], timeout=120), "rank 0 waits for one that is gone"
        has_ended, message = receive(pipes[0])
    assert not has_ended and "rror" in message
    assert ("optimizer.step()" if engine == "ddp" else "barrier") in message
