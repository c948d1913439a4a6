"""The modules of `launch/study.py` lie beside it."""

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="package", autouse=True)
def launch_scripts() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
