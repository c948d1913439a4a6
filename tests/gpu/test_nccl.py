"""Engines over NCCL: tests that run over gloo elsewhere, with two ranks on one GPU.

The bits they expect are computed by one process on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FILES = (
    "deepspeed/test_freezing.py",
    "deepspeed/test_native_load.py",
    "deepspeed/test_experts.py",
    "deepspeed/test_fragments.py",
    "distributed/test_names.py",
)


@pytest.mark.parametrize("file", FILES)
def test_over_nccl(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}"]
    environment = {**os.environ, "MICROADAM_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
