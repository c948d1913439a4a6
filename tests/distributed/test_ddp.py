"""DDP: every rank holds the whole state, and the bits are those of one process with the averaged gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microadam_dist import MicroAdam
from tests.deepspeed.engines import SETTINGS, make_gradients, make_model
from tests.ranks import run_ranks

NUM_STEPS = 12


def _train(rank: int, world_size: int) -> list[Tensor]:
    model = make_model()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = MicroAdam(model.named_parameters(), **SETTINGS)
    for grads in make_gradients(NUM_STEPS):
        wrapped(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = [tensor for p in model.parameters() for tensor in optimizer.state[p].values()]
    return [*(p.detach() for p in model.parameters()), *state]


def test_ranks_and_one_process_agree_in_every_bit() -> None:
    (alone,) = run_ranks(_train, 1)
    for world_size in (2, 3):
        for tensors in run_ranks(_train, world_size):
            assert len(tensors) == len(alone) > 20
            assert all(torch.equal(*pair) for pair in zip(tensors, alone, strict=True))


def _train_zero_redundancy(rank: int, world_size: int) -> list[Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    wrapped = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=MicroAdam, **SETTINGS)
    for grads in make_gradients(NUM_STEPS):
        wrapped(grads).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < sum(map(bool, optimizer.optim.state.values())) < len(list(model.parameters()))
    optimizer.consolidate_state_dict(to=0)
    if rank:
        return [p.detach() for p in model.parameters()]
    state = optimizer.state_dict()["state"]
    return [*(p.detach() for p in model.parameters()), *(x for i in sorted(state) for x in state[i].values())]


def test_zero_redundancy_optimizer_gives_the_bits_of_one_process() -> None:
    """It partitions whole parameters; its consolidated state is that of one process."""
    (alone,) = run_ranks(_train, 1)
    first, second = run_ranks(_train_zero_redundancy, 2)
    assert len(first) == len(alone)
    for tensors in (first, second):
        assert all(torch.equal(*pair) for pair in zip(tensors, alone, strict=False))
