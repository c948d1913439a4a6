"""The study runner: fair choices, no run twice, nothing dropped, nothing left running."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.launch.runs import ROOT

TINY = """
title: Tiny
question: Does it run?
seeds: 2
lr_factor: null
tasks:
  text:
    kind: text
    data: {data}
    model: {{num_hidden_layers: 1, hidden_size: 64, intermediate_size: 64}}
    pretrain: {{data: {data}, steps: 2}}
    seq_len: 16
    steps: {steps}
    eval_every: 2
    eval_sequences: 4
optimizers:
  AdamW: {{type: adamw, lr: [1e-3, 1]}}
  MicroAdam: {{type: microadam, lr: 4e-3, density: 0.05, window_size: 2}}
  Broken: {{type: adamw, lr: 1e-3, no_such_setting: 1}}
"""


def tiny_study(folder: Path, steps: int) -> Path:
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    (folder / "study.yaml").write_text(TINY.format(data=folder / "text.txt", steps=steps))
    return folder / "study.yaml"


@pytest.mark.slow
def test_study_resumes_and_reports_all(tmp_path: Path) -> None:
    from study import run_studies

    config, output = tiny_study(tmp_path, steps=4), tmp_path / "out"
    results = output / "study" / "results.jsonl"
    run_studies([config], output, num_workers=1, json_file=tmp_path / "losses.json")
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert losses["devices"] == ["cpu"] and [row["optimizer"] for row in losses["rows"] if row["note"]] == ["Broken"]
    records = [json.loads(line) for line in results.read_text().splitlines()]
    adamw = {r["lr"]: r["validation"]["loss"] for r in records if r["optimizer"] == "AdamW" and r["seed"] == 0}
    expected = [("AdamW", 1e-3, 0), ("AdamW", 1.0, 0), ("AdamW", min(adamw, key=adamw.get), 1)]
    expected += [("MicroAdam", 4e-3, 0), ("MicroAdam", 4e-3, 1)]
    assert sorted((r["optimizer"], r["lr"], r["seed"]) for r in records) == sorted(expected)
    page = (output / "report.html").read_text()
    assert "cannot run here: TypeError" in page
    assert page.count("data:image/svg+xml;base64") == 2

    # Half of the last line is lost: that run alone is done again, with the same result.
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:-1]) + lines[-1][:40])
    run_studies([config], output, num_workers=1, markdown=tmp_path / "markdown")
    again = results.read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["test"] == records[-1]["test"]
    assert "[text](figures/study_text_frontier.svg)" in (tmp_path / "markdown" / "RESULTS.md").read_text()
    assert (tmp_path / "markdown" / "figures" / "study_text_frontier.svg").is_file()


@pytest.mark.slow
def test_interrupted_study_leaves_no_process(tmp_path: Path) -> None:
    config, output = tiny_study(tmp_path, steps=1_000_000), tmp_path / "out"
    command = [sys.executable, ROOT / "launch" / "study.py", config, "--output", output, "--only", "text/AdamW"]
    # What a shell has started in the background ignores Ctrl-C, and so would its children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, "--jobs", "1"], stdout=subprocess.DEVNULL, preexec_fn=listen) as process:
        while not (output / "study" / "unavailable.json").is_file():  # written when training begins
            assert process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_study_for_a_gpu_needs_one(tmp_path: Path) -> None:
    from study import run_studies
    from training.errors import UserError

    config = tiny_study(tmp_path, steps=4)
    config.write_text(config.read_text().replace("seeds:", "device: cuda\nseeds:"))
    with pytest.raises(UserError, match="study: device: cuda, but torch .* sees no GPU here"):
        run_studies([config], tmp_path / "out", num_workers=1)


def record(lr: float, seed: int, loss: float | None) -> dict[str, Any]:
    return {"lr": lr, "seed": seed, "validation": None if loss is None else {"loss": loss, "accuracy": 0.0}}


def test_learning_rate_is_searched_until_the_best_lies_inside() -> None:
    """On a bowl around 1.6e-2, from far below, with a run that diverges above it."""
    from studies.config import Study
    from studies.runs import Cell, next_runs

    study = Study.model_validate(
        {
            "title": "",
            "question": "",
            "seeds": 3,
            "tasks": {"task": {"kind": "digits", "model": "cnn", "steps": 1, "eval_every": 1}},
            "optimizers": {"it": {"type": "adamw", "lr": "2e-3"}},
        }
    )
    losses = {1e-3: 5.0, 2e-3: 4.0, 4e-3: 3.0, 8e-3: 2.0, 1.6e-2: 1.0, 3.2e-2: None}
    cell, records = Cell("task", "it", ""), {}
    while runs := next_runs(study, cell, records):
        for run in runs:
            records[run.lr, run.seed] = record(run.lr, run.seed, losses[run.lr])
    assert {lr for lr, _ in records} == losses.keys()
    assert [key for key in records if key[1]] == [(1.6e-2, 1), (1.6e-2, 2)]


def test_every_rate_has_all_seeds_that_choose_it() -> None:
    """The rate that is best with seed 0 alone is not the best one; the optimum lies between the rates tried."""
    from studies.config import Study
    from studies.runs import Cell, best_rate, interpolate, next_runs, validation_losses

    task = {"kind": "digits", "model": "cnn", "steps": 1, "eval_every": 1}
    entry = {"type": "adamw", "lr": [1.0, 2.0, 4.0]}
    fields = {"title": "", "question": "", "tasks": {"task": task}, "optimizers": {"it": entry}}
    study = Study.model_validate({**fields, "seeds": 3, "search_seeds": 2, "lr_factor": None})
    cell, records = Cell("task", "it", ""), {}
    losses = {1.0: (0.5, 3.5), 2.0: (1.0, 1.0), 4.0: (1.5, 1.5)}
    for run in next_runs(study, cell, records):
        records[run.lr, run.seed] = record(run.lr, run.seed, losses[run.lr][run.seed])
    assert len(records) == 6 and best_rate(study, cell, records) == 2.0
    assert [run.seed for run in next_runs(study, cell, records)] == [2]
    means = validation_losses(study, cell, records)
    assert means == {1.0: 2.0, 2.0: 1.0, 4.0: 1.5}
    # Over x, the binary logarithm: 0.75 x^2 - 1.75 x + 2 goes through all three.
    rate, loss = interpolate(means, means)
    assert rate == pytest.approx(2 ** (1.75 / 1.5)) and loss == pytest.approx(2 - 1.75**2 / 3)
    assert interpolate({1.0: 1.0, 2.0: 2.0}, {1.0: 1.0, 2.0: 2.0}) is None


def test_splits_have_no_sequence_in_common(tmp_path: Path) -> None:
    import numpy as np

    from studies.config import TextTask
    from studies.tasks import prepare_data

    (tmp_path / "text.txt").write_text(" ".join(map(str, range(30_000))))
    task = TextTask(kind="text", data=str(tmp_path / "text.txt"), seq_len=64, steps=1, eval_every=1)
    prepare_data(task, tmp_path)
    (folder,) = (tmp_path / "data").iterdir()
    names = ("train", "validation", "test")
    splits = {name: {row.tobytes() for row in np.load(folder / f"{name}.npy")} for name in names}
    train, validation, test = splits.values()
    assert train.isdisjoint(validation | test) and validation.isdisjoint(test)
    assert min(map(len, splits.values())) * 12 > sum(map(len, splits.values()))


def test_state_is_counted_as_allocated() -> None:
    """Against MicroAdam's own account; and AdamW's two fp32 moments."""
    from studies.optimizers import build_optimizer, state_bytes

    for type_name in ("microadam", "adamw"):
        params = [("weight", torch.nn.Parameter(torch.ones(64, 128))), ("bias", torch.nn.Parameter(torch.ones(64)))]
        for _, param in params:
            param.grad = torch.ones_like(param)
        optimizer = build_optimizer(type_name, params, 1e-3, {})
        optimizer.step()
        if type_name == "microadam":
            account = optimizer.state_bytes()
            expected = account.sparse_bytes + account.dense_bytes
        else:
            expected = 8 * (64 * 128 + 64)
        steps = sum(state["step"].nbytes for state in optimizer.state.values() if torch.is_tensor(state["step"]))
        assert state_bytes(optimizer) == expected + steps


def test_fp32_error_keeps_what_top_k_leaves() -> None:
    """With everything kept there is no error; else gradient = kept + error, exactly."""
    from studies.fp32_error import MicroAdamFp32Error

    param = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = MicroAdamFp32Error([param], lr=1e-3, density=0.05, window_size=2)
    total = torch.zeros_like(param)
    for step in range(3):
        param.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        total += param.grad
        optimizer.step()
        accumulator, error = param.grad, optimizer.state[param]["error"]
        kept = accumulator - error
        assert ((kept != 0).sum(1) == 7).all()  # ceil(0.05 * 128)
        assert (kept[kept != 0] == accumulator[kept != 0]).all()
        assert (accumulator.abs() * (kept == 0)).amax(1).le((kept.abs() + 1e9 * (kept == 0)).amin(1) * 1.01).all()
        total -= kept
    assert torch.allclose(total, error, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("type: microadam", "optimizers.MicroAdam.type"),
        ("steps: 4", "tasks.text.text.steps"),
        ("kind: text", "tasks.text"),
    ],
)
def test_mistake_in_a_study_is_named(change: str, message: str, tmp_path: Path) -> None:
    from studies.config import load_study
    from training.errors import UserError

    config = tiny_study(tmp_path, steps=4)
    config.write_text(config.read_text().replace(change, change.split(":")[0] + ": nonsense"))
    with pytest.raises(UserError, match=message):
        load_study(config, quick=False)


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "studies").rglob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_repository_are_valid(config: Path) -> None:
    from studies.config import load_study

    full, quick = load_study(config, quick=False), load_study(config, quick=True)
    assert full.baseline in full.optimizers
    assert sum(task.steps for task in quick.tasks.values()) < sum(task.steps for task in full.tasks.values()) / 5
