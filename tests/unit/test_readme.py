"""What the README states and the package can compute."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def memory_table(what: str) -> str:
    script = [sys.executable, str(ROOT / "launch" / "bench" / "memory_table.py"), what]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("what", ["state", "plans"])
def test_memory_tables_are_the_computed_ones(what: str) -> None:
    table = memory_table(what)
    readme = (ROOT / "README.md").read_text()
    wanted = f"<!-- --8<-- [start:{what}] -->\n{table}<!-- --8<-- [end:{what}] -->"
    assert wanted in readme, f"run python launch/bench/memory_table.py {what} and paste its output:\n{table}"


def test_page_of_plans_is_the_computed_one() -> None:
    page = (ROOT / "launch" / "bench" / "results" / "MEMORY.md").read_text()
    assert memory_table("page") == page, "run python launch/bench/memory_table.py page > launch/bench/results/MEMORY.md"
