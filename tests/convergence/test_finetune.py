"""A small Llama, pre-trained on source, fine-tuned on English: test losses of short runs, as in configs/studies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ADAMW = {"type": "adamw", "lr": 2e-3, "weight_decay": 0.0}  # 4e-3 is worse
DEFAULT = {"type": "microadam", "lr": 8e-3}
WINDOW_2 = {"type": "microadam", "lr": 4e-3, "density": 0.05, "window_size": 2}

TestLoss = Callable[..., float]


@pytest.fixture(scope="module")
def test_loss(tmp_path_factory: pytest.TempPathFactory) -> TestLoss:
    """Settings of an optimizer -> test loss after 200 steps; every run happens once."""
    from studies.config import OptimizerEntry, Pretraining, Run, TextTask
    from studies.tasks import prepare_data, pretrain
    from studies.training import train

    folder: Path = tmp_path_factory.mktemp("study")
    task = TextTask(
        kind="text",
        data="python-reference",
        model={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192},
        pretrain=Pretraining(steps=400),
        seq_len=128,
        batch_size=2,
        steps=200,
        eval_every=200,
    )
    prepare_data(task, folder)
    pretrain(task, folder)

    @functools.cache
    def run(**settings: Any) -> float:
        entry = OptimizerEntry(**settings)
        loss = train(Run("", "", entry.lr[0], seed=0), task, entry, folder)["test"]["loss"]
        print(f"{settings}: {loss:.4f}")
        return loss

    return run


@pytest.mark.parametrize(("settings", "margin"), [(DEFAULT, 0.0), (WINDOW_2, 0.03)], ids=["default", "window 2"])
def test_as_good_as_adamw(test_loss: TestLoss, settings: dict[str, Any], margin: float) -> None:
    # AdamW 2.2328, MicroAdam 2.1864 and 2.2318 where this was written; 2.6950 before fine-tuning.
    assert test_loss(**settings) < test_loss(**ADAMW) + margin


@pytest.mark.parametrize("settings", [DEFAULT, WINDOW_2], ids=["default", "window 2"])
def test_error_feedback_is_needed(test_loss: TestLoss, settings: dict[str, Any]) -> None:
    # 2.2497 and 2.2953 without.
    assert test_loss(**settings) < test_loss(**settings, ef_bits=0) - 0.03


PAPER = {"type": "microadam", "lr": 4e-3, "density": 0.01, "window_size": 10}


@pytest.mark.parametrize("settings", [PAPER, WINDOW_2], ids=["window 10", "window 2"])
def test_a_packed_window_is_as_good(test_loss: TestLoss, settings: dict[str, Any]) -> None:
    assert abs(test_loss(**settings, packed_window=True) - test_loss(**settings)) < 0.01


def test_four_bits_are_enough(test_loss: TestLoss) -> None:
    """An error feedback that is not quantized is no better."""
    unquantized = test_loss(**{**WINDOW_2, "type": "microadam_fp32_error"})
    assert abs(test_loss(**WINDOW_2) - unquantized) < 0.02
