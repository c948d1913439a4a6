"""The script for a machine with a GPU, as far as it goes without: its parts, their limits, and what a failure does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = ["bits", "sanitizers", "nccl", "bench", "single-7b", "single-13b", "quality"]

# In the place of Python: one part fails, one is stopped as by its limit.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    -) cat > /dev/null; echo a_card ;;
    *"bench step"*) exit 3 ;;
    *"--model 7b"*) exit 124 ;;
    *gpu_tests.py*) echo "2 passed, 0 failed" ;;
esac
"""


def gpu_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "launch/bench/gpu_all.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_limits_make_ten_minutes() -> None:
    result = gpu_all("--dry-run", PYTHON="some-python")
    assert result.returncode == 0, result.stderr
    *parts, total = [line.split() for line in result.stdout.splitlines()]
    assert [name for name, *_ in parts] == PARTS
    assert sum(int(seconds) for _, seconds, *_ in parts) == int(total[3]) <= 600
    for part in parts:
        assert part[3] == "some-python"
        assert all((ROOT / word).exists() for word in part if word.endswith((".py", ".yaml"))), part
    shown = gpu_all("--dry-run", "--only", "quality,bits").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["bits", "quality", "all:"]
    unknown = gpu_all("--only", "bits,tea")
    assert unknown.returncode == 2 and f"--only tea: the parts are {' '.join(PARTS)}" in unknown.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run() -> None:
    result = gpu_all(PYTHON=sys.executable)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"gpu_all: torch {torch.__version__} of {sys.executable} sees no GPU" in result.stderr


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    result = gpu_all(PYTHON=str(python), OUT=str(tmp_path))
    assert result.returncode == 1
    table = result.stdout[result.stdout.index("a_card: JSON in") :].splitlines()[1:]
    assert [line.split()[0] for line in table] == PARTS
    ends = dict(zip(PARTS, (line.split("  ", 2)[-1] for line in table), strict=True))
    assert "passed" in ends["bits"] and "2 passed, 0 failed" in ends["bits"]
    assert "failed, exit code 3" in ends["bench"] and "over its limit" in ends["single-7b"]
    assert "passed" in ends["single-13b"] and "passed" in ends["quality"]
    assert gpu_all("--only", "quality", PYTHON=str(python), OUT=str(tmp_path)).returncode == 0


TESTS = """
import pytest

def test_good():
    pass

def test_bad():
    assert 1 == 2

@pytest.mark.skipif(True, reason="no such tool")
@pytest.mark.parametrize("what", "ab")
def test_skipped(what):
    pass
"""


def test_outcomes_as_json(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "launch/bench/gpu_tests.py", "--json", str(tmp_path / "out.json")]
    result = subprocess.run([*command, str(tmp_path), "-n", "1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines()[-1] == "1 passed, 1 failed, 2 skipped: no such tool"
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["passed"], found["failed"], found["skipped"], found["is_complete"]) == (1, 1, 2, True)
    (bad,) = (test for test in found["tests"].values() if test["outcome"] == "failed")
    assert "assert 1 == 2" in bad["reason"]
    assert found["versions"]["torch"] and found["command"].startswith("python launch/bench/gpu_tests.py --json")
