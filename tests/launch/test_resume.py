"""Training runs that stop and go on: as if nothing had happened, whether they were stopped or killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from microadam_dist import MicroAdam
from tests.launch.test_train import ROOT, TINY_LLAMA, _train
from tests.ranks import RankError, run_ranks, started_ranks

pytestmark = pytest.mark.deepspeed
NUM_KILLS = int(os.environ.get("MICROADAM_TEST_KILLS", "4"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"Line {i}: the quick brown fox jumps over the lazy dog.\n" for i in range(800)))
    path.with_name("model.json").write_text(json.dumps(TINY_LLAMA))
    return path


def options(text: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_config": text.with_name("model.json"),
        "tokenizer": "bytes",
        "data": [str(text)],
        "seq_len": 64,
        "lr": 4e-3,
        **MicroAdam.paper_defaults(),  # a window is more state to get wrong
        "steps": 12,
        "save_steps": 3,
        "logging_steps": 1,
        "output": output,
        **more,
    }


def assert_same_run(got: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (got, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [json.loads((folder / "metrics.json").read_text()) for folder in (got, expected)]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]
    assert losses[0]["heldout_after"] == losses[1]["heldout_after"]


@pytest.mark.parametrize("config", ["zero0_fp32", "zero2_bf16", "zero3_bf16", "zero2_bf16_master_free", None])
def test_trainer_resumes_exactly(config: str | None, text: Path, tmp_path: Path) -> None:
    deepspeed = None if config is None else ROOT / "configs" / "deepspeed" / f"{config}.json"
    world_size = 1 if config is None else 2
    run_ranks(_train, world_size, options(text, tmp_path / "straight", deepspeed=deepspeed))
    checkpoint = str(tmp_path / "straight" / "checkpoint-6")
    run_ranks(_train, world_size, options(text, tmp_path / "resumed", deepspeed=deepspeed, resume=checkpoint))
    assert_same_run(tmp_path / "resumed", tmp_path / "straight")


def test_a_finished_run_is_not_trained_on(text: Path, tmp_path: Path) -> None:
    """Killed between its last checkpoint and its end, it goes on from the one before."""
    run_ranks(_train, 1, options(text, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    (tmp_path / "again" / "model.safetensors").unlink()
    run_ranks(_train, 1, options(text, tmp_path / "again", resume="last"))
    assert_same_run(tmp_path / "again", tmp_path / "straight")
    with pytest.raises(RankError, match="that run is finished"):
        run_ranks(_train, 1, options(text, tmp_path / "again", resume=str(tmp_path / "again" / "checkpoint-12")))


def test_killed_runs_lose_nothing(text: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, every other time while a checkpoint is being written."""
    config = ROOT / "configs" / "deepspeed" / "zero2_bf16.json"
    run_ranks(_train, 2, options(text, tmp_path / "straight", deepspeed=config))
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
    with started_ranks(_train, 2, run) as (ranks, pipes):
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
