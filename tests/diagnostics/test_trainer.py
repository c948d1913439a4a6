"""The metrics in the logs of a real Trainer, and the picture that `microadam report` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner, Result

from microadam_dist import ConfigError, MicroAdam
from microadam_dist.cli.app import app
from microadam_dist.integrations.hf import MetricsCallback
from tests.launch.runs import TINY_LLAMA, options, train
from tests.ranks import run_ranks
from tests.text import tiny_llama


def make_trainer(folder: Path, optimizer: type = MicroAdam, **settings: Any) -> Trainer:
    tokens = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=7,
        logging_steps=2,
        save_strategy="no",
        report_to="tensorboard",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=tiny_llama(),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-3, **settings}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training: its log is in the folder."""
    folder = tmp_path_factory.mktemp("run") / "a [strange] <name> at $5"
    trainer = make_trainer(folder, metrics_every=2, density=0.05)
    trainer.add_callback(MetricsCallback(trainer))
    trainer.train()
    trainer.save_state()
    return folder


def test_trainer_logs_the_metrics_beside_its_own_numbers(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    metrics = {entry["step"]: entry for entry in history if "microadam/q" in entry}
    assert list(metrics) == [2, 4, 6]
    for entry in metrics.values():
        q, omega = entry["microadam/q"], entry["microadam/omega"]
        assert 0 < q < 1 and 0 < omega < 1
        assert entry["microadam/q_omega"] == pytest.approx((1 + omega) * q, rel=1e-12)
        assert 0.05 < entry["microadam/touched"] < 0.4
    plain = make_trainer(tmp_path, density=0.05)
    plain.train()
    losses = [[e["loss"] for e in log if "loss" in e] for log in (history, plain.state.log_history)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]


def test_tensorboard_gets_them(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.*")
    events = EventAccumulator(str(file)).Reload()
    assert [event.step for event in events.Scalars("train/microadam/q_omega")] == [2, 4, 6]


def test_callback_without_anything_to_log(tmp_path: Path) -> None:
    for settings, message in (
        ({"optimizer": torch.optim.AdamW}, r"the optimizer is <class 'torch.optim.adamw.AdamW'>"),
        ({}, r"needs MicroAdam\(..., metrics_every=N\)"),
    ):
        trainer = make_trainer(tmp_path, **settings)
        trainer.add_callback(MetricsCallback(trainer))
        with pytest.raises(ConfigError, match=message):
            trainer.train()


# ---------------------------------------------------------------- microadam report


def report(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "1000"}).invoke(app, ["report", *map(str, arguments)])


def test_report_is_one_html_file_with_everything_in_it(run: Path) -> None:
    result = report(run)
    assert result.exit_code == 0, result.output
    page = (run / "report.html").read_text()
    assert "<svg" in page and "a [strange] &lt;name&gt; at $5" in page
    assert "http-equiv" not in page and "<script" not in page
    for label in ("the theorem asks for", "weights touched by a step", "training", "error feedback / gradient"):
        assert f"<!-- {label}" in page, label  # how matplotlib notes the text that it draws as curves


def test_report_as_a_picture(run: Path, tmp_path: Path) -> None:
    result = report(run, "--output", tmp_path / "run.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_an_unfinished_run_reads_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    for name, content in (("checkpoint-9", "no JSON"), ("checkpoint-10", (run / "trainer_state.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(content)
    assert report(tmp_path).exit_code == 0
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no trainer_state.json, nor has a checkpoint in it"),
        ('{"log_history": [{"loss": 1.0, "step": 1}]}', "has a log without MicroAdam's metrics"),
        ("{}", "is no log of Trainer: KeyError('log_history')"),
        ("not JSON", "is no log of Trainer"),
    ],
)
def test_report_without_metrics(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    result = report(tmp_path)
    assert result.exit_code == 1
    assert message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "report.html").exists()


def test_report_of_no_folder_and_into_no_format(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path / "none"], "no such folder"),
        ([run, "--output", tmp_path / "run.doc"], "Format 'doc' is not supported"),
        ([run, "--output", tmp_path / "none" / "run.png"], "No such file or directory"),
    ):
        result = report(*arguments)
        assert result.exit_code == 1 and message in result.output, result.output


@pytest.mark.deepspeed
def test_launch_train_and_report(tmp_path: Path) -> None:
    """Two ranks under ZeRO-2, as a user runs them."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    (tmp_path / "model.json").write_text(json.dumps(TINY_LLAMA))
    config = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2_bf16.json"
    run_ranks(train, 2, options(text, tmp_path / "run", deepspeed=config, metrics_every=1))
    assert report(tmp_path / "run").exit_code == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "microadam/q" in entry] == [1, 2]
