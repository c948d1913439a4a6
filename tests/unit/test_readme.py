"""What the README states and the package can compute."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def memory_table(*options: str) -> str:
    script = [sys.executable, str(ROOT / "launch" / "memory_table.py"), *options]
    return subprocess.run(script, check=True, capture_output=True, text=True).stdout


def test_memory_table_is_the_computed_one() -> None:
    table = memory_table()
    readme = (ROOT / "README.md").read_text()
    assert f"begin -->\n{table}<!--" in readme, f"run python launch/memory_table.py and paste its output:\n{table}"


def test_page_of_plans_is_the_computed_one() -> None:
    page = (ROOT / "configs" / "models" / "MEMORY.md").read_text()
    assert memory_table("--page") == page, "run python launch/memory_table.py --page > configs/models/MEMORY.md"
