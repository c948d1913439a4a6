"""Jobs on worker processes of one thread each; none of them outlives the study."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """``function(*arguments)``; ``tag`` says what it is for."""

    tag: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Failure(NamedTuple):
    """In place of a result: the last line of an error, and all of it."""

    error: str
    details: str


class Workers:
    """A pool that survives the death of a worker. As a context manager: on leaving, all workers are ended.

    Args:
        num_workers: Processes.
        folder: Where torch.compile (torchao) may keep what it has compiled.
    """

    def __init__(self, num_workers: int, folder: Path) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._folder = folder
        self._processes: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        self._jobs: dict[Connection, Job] = {}
        self._num_workers = num_workers

    def __enter__(self) -> Workers:
        for _ in range(self._num_workers):
            self._start_worker()
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            if connection in self._jobs:
                process.terminate()
            connection.close()
        for process in self._processes.values():
            process.join()

    def _start_worker(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._folder), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        self._idle.append(ours)

    @property
    def num_idle(self) -> int:
        """Workers without a job."""
        return len(self._idle)

    @property
    def is_busy(self) -> bool:
        """Whether any job is under way."""
        return bool(self._jobs)

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker."""
        connection = self._idle.pop()
        self._jobs[connection] = job
        connection.send((job.function, job.arguments))

    def next_result(self) -> tuple[Job, Any]:
        """Wait for a job to end; a `Failure` if it raised or its process died."""
        connection = wait(list(self._jobs))[0]
        job = self._jobs.pop(connection)
        try:
            result = connection.recv()
            self._idle.append(connection)
        except EOFError:
            process = self._processes.pop(connection)
            process.join()
            result = Failure(f"the process ended with exit code {process.exitcode}", "")
            self._start_worker()
        return job, result


def _work(connection: Connection, folder: Path) -> None:
    """Loop of a worker, until the other end of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the study ends its workers itself
    # torchao compiles its step: in this process, not in helpers of its own, and nothing is left in /tmp.
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=str(folder), TORCHINDUCTOR_COMPILE_THREADS="1")
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            try:
                result = function(*arguments)
            except Exception as error:
                result = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(result)
