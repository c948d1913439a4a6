"""The ``microadam`` command."""

import os
import subprocess
import sys


def microadam(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from microadam_dist.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_help_names_the_commands() -> None:
    result = microadam("--help")
    assert result.returncode == 0
    assert "reshard" in result.stdout and "doctor" in result.stdout


def test_doctor_says_what_is_used_and_why_something_is_not() -> None:
    result = microadam("doctor", MICROADAM_CPU_LIBRARY="/nonexistent/kernel.so", COLUMNS="300")
    assert result.returncode == 0, result.stderr
    assert "not available" in result.stdout and "/nonexistent/kernel.so" in result.stdout
    assert [line.split()[-1] for line in result.stdout.splitlines() if 'backend="auto" on cpu' in line] == ["reference"]
