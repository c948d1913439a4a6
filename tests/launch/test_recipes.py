"""``train.py --recipe``: the files of configs/single_gpu, what the command line changes in them, and bad ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from microadam_dist.planner.engines import Engine
from microadam_dist.planner.fit import capacity
from microadam_dist.planner.gpus import needed_bytes
from microadam_dist.planner.memory import Dtype, Job, Optimizer, make_plan
from microadam_dist.planner.shapes import read_shape
from tests.launch.runs import LAUNCH, ROOT, TINY_LLAMA

TRAINING_PAGE = LAUNCH / "site" / "pages" / "training.md"
RECIPES = sorted((ROOT / "configs" / "single_gpu").glob("*.yaml"))
MODELS = {  # and the GB of one GPU
    "7b_16gb": ("llama-2-7b", 16),
    "8b_24gb": ("llama-3-8b", 24),
    "13b_32gb": ("llama-2-13b", 32),
    "70b_8x40gb": ("llama-2-70b", 40),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Result, list[Any]]:
    """The command, and the options with which it would train."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    import train

    seen: list[Any] = []
    monkeypatch.setattr(train, "train", seen.append)
    app = typer.Typer()
    app.command(cls=train.OneLineErrors)(train.main)
    return CliRunner().invoke(app, [*arguments, "--data", "book.txt", "--output", "run"]), seen


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_what_it_says(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load(recipe.read_text())
    result, (options,) = run(monkeypatch, "--recipe", str(recipe), "--model", "model")
    assert result.exit_code == 0, result.output
    assert {name: getattr(options, name) for name in settings} == settings
    result, (other,) = run(
        monkeypatch, "--recipe", str(recipe), "--model", "model", "--ef-bits", "4", "--seq-len", "99"
    )
    assert other == dataclasses.replace(options, ef_bits=4, seq_len=99)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_planned_peak_is_the_one_in_the_file(recipe: Path) -> None:
    from microadam_dist.config import MicroAdamConfig
    from microadam_dist.planner.activations import default_loss_chunk

    settings = yaml.safe_load(recipe.read_text())
    model, gigabytes = MODELS[recipe.stem]
    shape = read_shape(ROOT / "configs" / "models" / f"{model}.json")
    engine: dict[str, Any] = {"engine": Engine.fsdp2, "gpus": 8}
    if settings.get("single_gpu"):
        engine = {"engine": Engine.single, "loss_chunk": default_loss_chunk(shape.vocab)}
    job = Job(
        **engine,
        dtype=Dtype.pure_bf16,
        seq=settings["seq_len"],
        config=MicroAdamConfig(ef_bits=settings["ef_bits"]),
        gradient_release=True,
        activation_checkpointing=True,
        offload_activations=settings.get("offload_activations", False),
    )
    plan = make_plan(shape, job)[Optimizer.microadam]
    peak, state = f"{plan.total / 2**30:.2f}", f"{plan.optimizer_state / 2**30:.2f}"
    assert f"planned peak {peak} GiB at sequences of {job.seq}, of which {state} are" in recipe.read_text()
    (row,) = (line for line in TRAINING_PAGE.read_text().splitlines() if f"/{recipe.name})" in line)
    assert row.split("|")[2:6] == [f" {cell} " for cell in (job.seq, job.config.ef_bits, peak, state)]
    if recipe.stem != "7b_16gb":  # it needs what is assumed to be lost to fragmentation, too
        assert needed_bytes(plan.total) <= capacity(gigabytes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ef_bit: 2", "no option 'ef_bit'; did you mean 'ef_bits'?"),
        ("ef_bits: many", "'many' is no number"),
        ("- ef_bits", "expected options and their values"),
        ("ef_bits: [", "recipe.yaml: while parsing"),
        (None, "No such file"),
    ],
)
def test_bad_recipes(content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content:
        recipe.write_text(content)
    result, seen = run(monkeypatch, "--recipe", str(recipe), "--model", "model")
    assert result.exit_code == 2 and message in " ".join(result.output.split()) and not seen


def test_a_recipe_trains(tmp_path: Path) -> None:
    import json
    import subprocess
    import sys

    model, text = tmp_path / "model.json", tmp_path / "text.txt"
    model.write_text(json.dumps(TINY_LLAMA))
    text.write_text("hello world. " * 300)
    command = [sys.executable, LAUNCH / "train.py", "--recipe", RECIPES[0], "--model-config", model]
    command += ["--tokenizer", "bytes", "--data", text, "--output", tmp_path / "run", "--steps", "2", "--seq-len", "32"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["heldout_after"] < metrics["heldout_before"]
