"""What these tests need of `launch`."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="package")
def rosenbrock() -> ModuleType:
    """The script that draws Figure 1 of the paper; its modules lie beside `launch/study.py`."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
    return importlib.import_module("studies.rosenbrock")
