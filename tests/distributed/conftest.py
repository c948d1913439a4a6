"""What several test files compare with, and what they load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .checkpoints import SAVED_AT, Expected, make, save, steps_of_one_process
from .models import train


@pytest.fixture(scope="session")
def expected() -> Expected:
    return steps_of_one_process()


@pytest.fixture(scope="session")
def saved_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a plain process, in bf16."""
    folder = tmp_path_factory.mktemp("one")
    model, optimizer = make(torch.bfloat16, mesh=None)
    train(model, optimizer, range(SAVED_AT))
    save(folder, model, optimizer)
    return folder
