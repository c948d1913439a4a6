"""`train.py --resume` on another engine, another ZeRO stage or another number of ranks than wrote the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from microadam_dist import CheckpointMismatchError, MicroAdam, MicroAdamConfig
from microadam_dist.checkpoint.deepspeed_reshard import reshard_checkpoint
from microadam_dist.checkpoint.trainer import read_training
from microadam_dist.layout import ShardSpan, StateLayout
from tests.ranks import RankError, run_ranks

from .accelerate_engines import train_under
from .runs import ROOT, options_with_checkpoints, train

pytestmark = pytest.mark.deepspeed
SAVED_AT, END = 6, 12
SAMPLES = 6  # of a step, on any number of ranks


def _options(text: Path, output: Path, num_ranks: int, **more: Any) -> dict[str, Any]:
    batch_size = SAMPLES // num_ranks
    steps = {"steps": END, "save_steps": SAVED_AT}
    return options_with_checkpoints(text, output, batch_size=batch_size, **steps, **more)


@pytest.fixture(scope="module")
def saved(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole runs, each with a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("saved-by-2-ranks")
    for config in ("ddp", "fsdp1", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"):
        more = {"shard_state": "touched"} if config == "ddp" else {}
        train_under(config, _options(text, folder / config, 2, **more))
    return {run.name: run for run in folder.iterdir()}


MOVES = [
    ("deepspeed_zero2", "deepspeed_zero2", 3),
    ("deepspeed_zero3", "fsdp1", 3),
    ("fsdp1", "deepspeed_zero3", 2),
    ("fsdp2", "single_gpu", 1),
    ("ddp", "deepspeed_zero2", 2),
    ("deepspeed_zero2", "fsdp2", 2),
    ("ddp", "ddp", 3),
    ("ddp", "single_gpu", 1),
]


@pytest.mark.parametrize(("source", "target", "num_ranks"), MOVES)
def test_goes_on_anywhere(
    source: str, target: str, num_ranks: int, saved: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """The loss of the run that was not moved, but for the precision of another engine; and state of all steps."""
    checkpoint = str(saved[source] / f"checkpoint-{SAVED_AT}")
    metrics = train_under(target, _options(text, tmp_path, num_ranks, resume=checkpoint), num_ranks)
    straight = json.loads((saved[source] / "metrics.json").read_text())
    assert [step for step, _ in metrics["train_loss"]] == [step for step, _ in straight["train_loss"]]
    distances = [abs(metrics["train_loss"][step][1] - straight["train_loss"][step][1]) for step in range(END)]
    print(f"{source} -> {target} on {num_ranks}: {[round(d, 4) for d in distances[SAVED_AT:]]} nats apart")
    assert distances[:SAVED_AT] == [0] * SAVED_AT
    learned = straight["train_loss"][0][1] - straight["train_loss"][SAVED_AT][1]  # what lost weights would cost
    print(f"learned until then: {learned:.3f} nats")
    assert max(distances) < 0.03 < learned / 5
    training = read_training(tmp_path / f"checkpoint-{END}")
    config = MicroAdamConfig(**MicroAdam.paper_defaults())
    spans = [ShardSpan.whole(name, shape) for name, shape in training.weights.shapes.items()]
    states = training.states([StateLayout((span,), config) for span in spans])
    assert [int(state["step"]) for state in states if state is not None] == [END] * len(spans)


def test_what_reshard_writes_is_a_checkpoint(saved: dict[str, Path], text: Path, tmp_path: Path) -> None:
    checkpoint = saved["deepspeed_zero2"] / f"checkpoint-{SAVED_AT}"
    reshard_checkpoint(checkpoint, tmp_path / checkpoint.name, 3)
    losses = []
    for name, resume in (("native", tmp_path / checkpoint.name), ("elastic", checkpoint)):
        metrics = train_under("deepspeed_zero2", _options(text, tmp_path / name, 3, resume=str(resume)), 3)
        losses.append(metrics["train_loss"])
    assert losses[0] == losses[1]


def test_another_optimizer_or_model_is_refused(saved: dict[str, Path], text: Path, tmp_path: Path) -> None:
    checkpoint = saved["fsdp2"] / f"checkpoint-{SAVED_AT}"
    (checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointMismatchError, match="pytorch_model_fsdp_0 is damaged"):
        read_training(checkpoint)
    for name in ("deepspeed_zero2", "ddp"):
        config = ROOT / "configs" / "deepspeed" / "zero3_bf16.json" if name == "ddp" else None
        checkpoint = saved[name] / f"checkpoint-{SAVED_AT}"
        run = _options(text, tmp_path / name, 1, resume=str(checkpoint), deepspeed=config, density=0.02)
        with pytest.raises(RankError, match="construct the optimizer with density=0.01"):
            run_ranks(train, 1, run)
    with pytest.raises(CheckpointMismatchError, match=r"no model.safetensors"):
        read_training(tmp_path)
