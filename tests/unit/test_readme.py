"""What the README states and the package can compute."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_memory_table_is_the_computed_one() -> None:
    script = [sys.executable, str(ROOT / "launch" / "memory_table.py")]
    table = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    readme = (ROOT / "README.md").read_text()
    assert f"begin -->\n{table}<!--" in readme, f"run python launch/memory_table.py and paste its output:\n{table}"
