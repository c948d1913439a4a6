"""`run_ranks`: one function on several real processes, over gloo, or over NCCL on one GPU."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Imported once by the fork server, so that starting a rank takes a fraction of a second. ZeRO imports muon_optimizer
# when it is configured, and torch's compiler with it: 4 seconds. Runs of train.py import what follows it: 4 more.
_PRELOAD = [
    "torch",
    "torch.distributed.checkpoint",
    "deepspeed",
    "microadam_dist",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "torch.utils.tensorboard",
]
_TIMEOUT_SECONDS = 240
# "cuda": all ranks share one GPU, over NCCL; see tests/gpu/test_nccl.py.
DEVICE = os.environ.get("MICROADAM_TEST_DEVICE", "cpu")


def rank_device() -> torch.device:
    """Where the tensors of a rank lie; the process that computes what is expected of ranks stays on the CPU."""
    return torch.device("cuda", 0) if DEVICE == "cuda" and dist.is_initialized() else torch.device("cpu")


class RankError(AssertionError):
    """At least one rank failed; the message has the traceback of each."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` on every rank of a process group.

    Args:
        function: Defined at module level; its arguments and result are pickled.

    Returns:
        The results, by rank.

    Raises:
        RankError: A rank raised, died or did not answer in time. No rank is left running.
    """
    with started_ranks(function, world_size, *args) as (_, pipes):
        return _collect(pipes)


@contextlib.contextmanager
def started_ranks(
    function: Callable[..., Any], world_size: int, *args: Any
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """The processes of `run_ranks` and what they answer through, while they run; none is left at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[BaseProcess] = []
        pipes: list[Connection] = []
        try:
            for rank in range(world_size):
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main, args=(sending, os.path.join(folder, "store"), function, rank, world_size, args)
                )
                process.start()
                sending.close()
                ranks.append(process)
                pipes.append(receiving)
            yield ranks, pipes
        finally:
            for process in ranks:
                process.terminate()
                process.join()


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and not failures:
        ready = wait(list(open_pipes), timeout=_TIMEOUT_SECONDS)
        if not ready:
            failures.append(f"ranks {sorted(open_pipes.values())} did not answer within {_TIMEOUT_SECONDS} s")
        for pipe in ready:
            rank = open_pipes.pop(pipe)  # type: ignore[call-overload]
            try:
                succeeded, result = receive(pipe)  # type: ignore[arg-type]
            except EOFError:
                succeeded, result = False, "the process died without a word"
            if succeeded:
                results[rank] = result
            else:
                failures.append(f"rank {rank}:\n{result}")
    # The ranks that wait for a failed one are not waited for, but what they have said already is shown.
    for pipe, rank in open_pipes.items():
        if failures and pipe.poll(1):
            try:
                failures.append(f"rank {rank}:\n{receive(pipe)[1]}")
            except EOFError:
                pass
    if failures:
        raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection, store: str, function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    torch.set_num_threads(1)
    gc.freeze()  # the hundreds of thousands of objects of what is imported: no collection need look at them
    try:
        backend = _share_gpu(rank) if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(rank, world_size, *args)
        if dist.is_initialized():  # the function may have ended it, as launch/train.py does
            dist.barrier()
            dist.destroy_process_group()
        _send(pipe, (True, result))
    except BaseException:
        _send(pipe, (False, traceback.format_exc()))


def _share_gpu(rank: int) -> str:
    """Put this rank on the one GPU, beside the others; returns its backends."""
    # NCCL refuses two ranks on one GPU of a host, so each is a host of its own.
    os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1", NCCL_IB_DISABLE="1")
    os.environ.update(NCCL_SOCKET_IFNAME="lo", LOCAL_RANK="0")
    torch.cuda.set_device(0)
    return "cpu:gloo,cuda:nccl"


def _send(pipe: Connection, message: tuple[bool, Any]) -> None:
    # Not pipe.send: torch would pass its tensors as shared memory, which dies with this process.
    buffer = io.BytesIO()
    torch.save(message, buffer)
    pipe.send_bytes(buffer.getvalue())


def receive(pipe: Connection) -> tuple[bool, Any]:
    message: tuple[bool, Any] = torch.load(io.BytesIO(pipe.recv_bytes()), map_location="cpu", weights_only=False)
    return message
