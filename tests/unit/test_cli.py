"""The ``microadam`` command: what it prints where, as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from microadam_dist.cli.app import app
from microadam_dist.cli.settings import parse_density, with_percent
from tests.disks import mounted_tmpfs, needs_root

COMMAND = [sys.executable, "-c", "from microadam_dist.cli import main; main()"]


def microadam(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env={**os.environ, **environment})


def test_help_names_the_commands() -> None:
    result = microadam("--help")
    assert result.returncode == 0
    assert "reshard" in result.stdout and "doctor" in result.stdout


def test_version() -> None:
    result = microadam("--version")
    assert (result.returncode, result.stdout) == (0, f"microadam {version('microadam-dist')}\n")


def test_doctor_says_what_is_used_and_why_something_is_not() -> None:
    broken = {"MICROADAM_CPU_LIBRARY": "/nonexistent/kernel.so", "COLUMNS": "300"}
    result = microadam("doctor", **broken)
    assert result.returncode == 0, result.stderr
    assert "not available" in result.stdout and "/nonexistent/kernel.so" in result.stdout
    assert [line.split()[-1] for line in result.stdout.splitlines() if 'backend="auto" on cpu' in line] == ["reference"]
    content = json.loads(microadam("doctor", "--json", "-", **broken).stdout)
    assert all(check["remedy"] for check in content["cuda"] if not check["passed"])
    assert content["auto"]["cpu"] == "reference" and "/nonexistent/kernel.so" in content["backends"]["cpu"]
    assert content["versions"]["microadam-dist"] == version("microadam-dist")


BENCH = "bench step --numel 4K --dtype fp32 --repeats 1 --no-reference --settings"


@pytest.mark.parametrize("command", ["plan --model 7b", f"{BENCH} 1/10%"])
def test_json_on_standard_output_is_alone_there(command: str) -> None:
    result = microadam(*command.split(), "--json", "-")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)
    assert "MicroAdam" in result.stderr  # the table


# ------------------------------------------------------------------ errors

MISTAKES = {
    "nonsense": (2, "No such command 'nonsense'. See 'microadam --help'."),
    "--nonsense": (2, "No such option: --nonsense"),
    "plan --model 7b --density x%": (2, "'x%' is no fraction: expected a number such as 0.01 or 1%"),
    "plan --model 7b --density 101%": (1, "density=1.01: expected a number in (0, 1]"),
    f"plan --model {'x' * 90}": (1, "Nothing is downloaded here"),
    "plan --model 7b --json /dev/full": (1, "/dev/full cannot be written: No space left on device."),
    "plan --model 7b --json none/plan.json": (1, "none/plan.json cannot be written: No such file or directory."),
    f"{BENCH} 1/10% --json none/bench.json": (1, "none/bench.json cannot be written: No such file or directory."),
    f"{BENCH} 10": (1, "setting '10': expected window_size/density such as 10/1%"),
    "report none": (1, "no such folder: none"),
    "reshard none new --world-size 2": (1, "none/latest is missing: none is no DeepSpeed checkpoint"),
    "reshard none new --world-size 0": (1, "world size 0: expected at least 1"),
    "reshard none new": (2, "Missing option '--world-size'. See 'microadam reshard --help'."),
}


@pytest.mark.parametrize("command", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = MISTAKES[command]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command.split(), prog_name="microadam")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert result.exit_code == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["--help", "plan --model 7b --json -"])
def test_standard_output_may_be_full_or_closed(command: str) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*COMMAND, *command.split()], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "error: No space left on device" and "Traceback" not in result.stderr
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        result = subprocess.run([*COMMAND, *command.split()], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert "rror" not in result.stderr


@needs_root
def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "64k") as disk:
        (disk / "plan.json").write_text("the last plan")
        (disk / "filler").write_bytes(bytes(disk_free(disk)))
        result = microadam("plan", "--model", "7b", "--json", str(disk / "plan.json"))
        assert result.returncode == 1
        assert result.stderr == f"error: {disk / 'plan.json'} cannot be written: No space left on device.\n"
        assert (disk / "plan.json").read_text() == "the last plan"
        assert len(list(disk.iterdir())) == 2


def disk_free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


# ------------------------------------------------------------------ what is parsed


@pytest.mark.parametrize(("text", "expected"), [("1%", 0.01), ("0.01", 0.01), (".7%", 0.007), ("100%", 1), (0.1, 0.1)])
def test_density(text: str | float, expected: float) -> None:
    assert parse_density(text) == expected


@given(st.integers(1, 10**6), st.integers(0, 6))
def test_percent_and_fraction_are_one_setting(digits: int, places: int) -> None:
    percent, fraction = (f"{Decimal(digits).scaleb(-shift):f}" for shift in (places, places + 2))
    assert parse_density(f"{percent}%") == parse_density(fraction)
    assert with_percent(f"10/{fraction}/packed") == with_percent(f"10/{fraction}") + "/packed"
    assert parse_density(with_percent(f"10/{fraction}").removeprefix("10/")) == parse_density(fraction)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["log_history", "step", "loss", "microadam/q", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
LOGS = JSON | st.fixed_dictionaries({"log_history": st.lists(JSON, max_size=3)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=40) | LOGS.map(lambda x: json.dumps(x).encode()))
def test_any_log_is_drawn_or_refused(content: bytes, tmp_path: Path) -> None:
    _run_on(content, tmp_path / "trainer_state.json", ["report", str(tmp_path), "--output", str(tmp_path / "a.svg")])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from("hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()), JSON
    ).map(lambda x: json.dumps({"model_type": "llama", **x}).encode())
)
def test_any_model_is_planned_or_refused(content: bytes, tmp_path: Path) -> None:
    _run_on(content, tmp_path / "config.json", ["plan", "--model", str(tmp_path / "config.json")])


def _run_on(content: bytes, file: Path, command: list[str]) -> None:
    file.write_bytes(content)
    result: Any = CliRunner().invoke(app, command)
    assert result.exit_code in (0, 1) and isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code:
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and file.name in line
