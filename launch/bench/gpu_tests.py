"""Runs tests and writes what came of each as JSON, with the machine they ran on, also when they are interrupted.

    python launch/bench/gpu_tests.py --json bits.json tests/gpu -k "not sanitizer"

What follows the file goes to pytest. The last line says how many passed, failed and were skipped, and why.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from microadam_dist.diagnostics.environment import versions


class Outcomes:
    """A plugin that remembers how each test ended."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the first part of a test that did not pass, else the test itself."""
        entry = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + report.duration, 2)
        if report.outcome != "passed" and entry["outcome"] == "passed":
            entry["outcome"] = report.outcome
            entry["reason"] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple | list) else str(report.longrepr)[-2000:]
            )

    def count(self, outcome: str) -> int:
        """Tests that ended so."""
        return sum(test["outcome"] == outcome for test in self.tests.values())

    def summary(self) -> str:
        """One line."""
        skipped = Counter(
            test["reason"].removeprefix("Skipped: ") for test in self.tests.values() if test["outcome"] == "skipped"
        )
        reasons = "; ".join(f"{number} skipped: {reason}" for reason, number in skipped.items())
        return f"{self.count('passed')} passed, {self.count('failed')} failed" + (f", {reasons}" if reasons else "")


def main() -> int:
    """Run pytest; its exit code."""
    if len(sys.argv) < 3 or sys.argv[1] != "--json":
        print(__doc__, file=sys.stderr)
        return 2
    outcomes = Outcomes()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[3:]], plugins=[outcomes])
    result = {
        "command": shlex.join(["python", "launch/bench/gpu_tests.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        **{outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")},
        "is_complete": code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
        "tests": outcomes.tests,
    }
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(outcomes.summary())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
