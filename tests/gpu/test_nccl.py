"""Engines over NCCL and programs on a GPU: tests that run over gloo and on the CPU elsewhere, in the same functions.

All ranks share one GPU. The bits they must have are computed by one process on the CPU.
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

ACCELERATE = ("ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp1", "fsdp2", "single_gpu")

# Name -> arguments of pytest.
RUNS = {
    "fsdp1": ["tests/distributed/test_fsdp1.py", "-k", "not heldout"],
    "fsdp2": ["tests/distributed/test_fsdp2.py", "-k", "not [3]"],  # NCCL averages over 3 with a rounded third
    "ddp": ["tests/distributed/test_ddp.py", "tests/distributed/test_ddp_sharded.py"],
    "names": ["tests/distributed/test_names.py"],
    "zero stages": ["tests/deepspeed/test_stages.py"],
    **{f"zero matrix {x}": ["tests/deepspeed/test_matrix.py", "-k", f"{x}-"] for x in ("fp32", "bf16", "fp16")},
    **{f"zero resume {x}": ["tests/deepspeed/test_resume.py", "-k", f"{x}-"] for x in ("fp32", "bf16", "fp16")},
    "sparse gather": ["tests/deepspeed/test_sparse_allgather.py", "-m", "deepspeed"],
    "freezing": ["tests/deepspeed/test_freezing.py"],
    "native load": ["tests/deepspeed/test_native_load.py"],
    "experts": ["tests/deepspeed/test_experts.py"],
    "fragments": ["tests/deepspeed/test_fragments.py"],
    "--single-gpu": ["tests/launch/test_single_gpu.py", "-k", "resumed or on_a_gpu"],
    **{f"accelerate {x}": ["tests/launch/test_accelerate.py", "-k", f"on_a_gpu and {x}"] for x in ACCELERATE},
}


@pytest.mark.parametrize("run", RUNS)
def test_over_nccl(run: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *RUNS[run]]
    environment = {**os.environ, "MICROADAM_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
