"""What the runs train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .runs import TINY_LLAMA


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the configuration of a model, model.json, beside it."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"Line {i}: the quick brown fox jumps over the lazy dog.\n" for i in range(800)))
    path.with_name("model.json").write_text(json.dumps(TINY_LLAMA))
    return path
