"""Training runs that stop and go on: as if nothing had happened, whether they were stopped or killed."""

from __future__ import annotations

import random
import shutil
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

from tests.amount import amount
from tests.launch.runs import ROOT, assert_same_run, train
from tests.launch.runs import options_with_checkpoints as options
from tests.ranks import RankError, run_ranks, started_ranks

pytestmark = pytest.mark.deepspeed
NUM_KILLS = amount(20)


@pytest.mark.parametrize("config", ["zero0_fp32", "zero2_bf16", "zero3_bf16", "zero2_bf16_master_free", None])
def test_trainer_resumes_exactly(config: str | None, text: Path, tmp_path: Path) -> None:
    deepspeed = None if config is None else ROOT / "configs" / "deepspeed" / f"{config}.json"
    world_size = 1 if config is None else 2
    run_ranks(train, world_size, options(text, tmp_path / "straight", deepspeed=deepspeed))
    checkpoint = str(tmp_path / "straight" / "checkpoint-6")
    run_ranks(train, world_size, options(text, tmp_path / "resumed", deepspeed=deepspeed, resume=checkpoint))
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_a_finished_run_is_not_trained_on(text: Path, tmp_path: Path) -> None:
    """Killed between its last checkpoint and its end, it goes on from the one before."""
    run_ranks(train, 1, options(text, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").unlink()
    run_ranks(train, 1, options(text, tmp_path / "again", resume="last"))
    assert_same_run(tmp_path / "again", tmp_path / "straight")
    with pytest.raises(RankError, match="that run is finished"):
        run_ranks(train, 1, options(text, tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-12")))


def test_killed_runs_lose_nothing(text: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, every other time while a checkpoint is being written."""
    config = ROOT / "configs" / "deepspeed" / "zero2_bf16.json"
    run_ranks(train, 2, options(text, tmp_path / "straight", deepspeed=config))
    chance = random.Random(0)
    kills = num_runs = 0
    while kills < NUM_KILLS:
        folder, num_runs = tmp_path / f"killed-{num_runs}", num_runs + 1
        while _run_until(
            options(text, folder, deepspeed=config, resume="last"),
            seconds=chance.uniform(1.0, 6.0) if kills < NUM_KILLS else None,
            in_checkpoint=kills % 2 == 1,
        ):
            kills += 1
        assert_same_run(folder, tmp_path / "straight")
    print(f"{kills} kills, {num_runs} runs, all with the weights of the uninterrupted one")


def _run_until(run: dict[str, Any], seconds: float | None, in_checkpoint: bool) -> bool:
    """Run and kill all ranks after some seconds, or earlier in the middle of a checkpoint; returns whether killed."""
    unfinished_before = _unfinished(run["output"])
    with started_ranks(train, 2, run) as (ranks, pipes):
        start = time.monotonic()
        while not wait(pipes, timeout=0.002):
            writing = in_checkpoint and _unfinished(run["output"]) - unfinished_before
            if seconds is not None and (writing or time.monotonic() - start > seconds):
                for process in ranks:
                    process.kill()
                return True
        for pipe in pipes:
            assert wait([pipe], timeout=60), "a rank did not finish"
        return False


def _unfinished(output: Path) -> set[Path]:
    return {path for path in output.glob("checkpoint-*") if not (path / "complete").exists()}
