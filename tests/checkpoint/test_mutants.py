"""Damaged checkpoints, in every form there is: refused by name with nothing changed, or loaded exactly."""

from __future__ import annotations

import faulthandler
import functools
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.amount import amount
from tests.checkpoint.subjects import make_subjects, same
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
NUM_MUTANTS = amount(500)
AT_A_TIME = 50
SECONDS = 60  # to load one


@pytest.mark.parametrize("first", range(0, NUM_MUTANTS, AT_A_TIME))
def test_mutants_are_refused_or_loaded_exactly(first: int, tmp_path: Path) -> None:
    numbers = list(range(first, min(first + AT_A_TIME, NUM_MUTANTS)))
    outcomes, faults = run_ranks(load_mutants, 2, tmp_path, numbers)[0]
    print(outcomes)
    assert not faults, "\n\n".join(faults)


def load_mutants(rank: int, world_size: int, root: Path, numbers: list[int]) -> tuple[dict[str, int], list[str]]:
    """Returns how many there were of each outcome, and everything that is wrong; a number seeds its mutant."""
    subjects = make_subjects(root)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    for number in numbers:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        chance, subject = random.Random(number), subjects[number % len(subjects)]
        folder = root / f"mutant-{number}"
        done = ""
        if rank == 0:
            shutil.copytree(subject.good, folder)
            done = subject.damage(chance, folder)
        rewritten = subject.rewrite(folder) if rank == 0 else None
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, (done, rewritten))
        (done, rewritten), *_ = everyone
        title = f"mutant {number} of {subject.good.parent.name}, {done}"
        attempts = [(way, folder, *how) for way, how in subject.ways.items()]
        if isinstance(rewritten, Path):
            attempts += [(f"{way} of what reshard wrote", rewritten, *how) for way, how in subject.ways.items()]
        elif rewritten is not None:
            faults.append(f"{title}: {rewritten}")
        for way, source, trainee, load in attempts:
            outcome, message = trainee.attempt(functools.partial(load, source), loads_weights=subject.has_weights)
            dist.all_gather_object(everyone, (outcome, message))
            outcomes[outcome] += 1
            found = {outcome for outcome, _ in everyone}
            if found not in ({"refused"}, {"loaded"}):
                ranks = [f"rank {r}: {outcome}\n{message}" for r, (outcome, message) in enumerate(everyone)]
                faults.append("\n".join([f"{title}, {way}:", *ranks]))
            if found != {"refused"}:
                trainee.restore()
                assert same(trainee.snapshot(), trainee.end)
    faulthandler.cancel_dump_traceback_later()
    return dict(outcomes), faults
