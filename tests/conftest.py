"""Set up for all tests."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

# As Python does for a script there, in the processes that ranks are, too.
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

# The tensors are tiny: one thread is faster than two, and ranks run beside each other.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With ``--durations``: which files take the time."""
    if not terminalreporter.config.option.durations:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"slowest files, of {sum(seconds.values()) / 60:.0f} minutes")
    for file, total in seconds.most_common(40):
        terminalreporter.write_line(f"{total:5.0f} s  {file}")
