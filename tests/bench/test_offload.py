"""launch/bench/offload.py: real engines with offload_optimizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "bench" / "offload.py"


@pytest.mark.deepspeed
def test_every_stage_and_optimizer(tmp_path: Path) -> None:
    target = tmp_path / "offload.json"
    options = ["--stages", "1,3", "--ranks", "2", "--numel", "64K", "--settings", "2/5%", "--repeats", "1"]
    run = subprocess.run([sys.executable, SCRIPT, *options, "--json", target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(target.read_text())["rows"]
    expected = [(stage, name) for stage in (1, 3) for name in ("torch AdamW fused", "MicroAdam 2/5%")]
    assert [(row["stage"], row["optimizer"]) for row in rows] == expected
    assert all(0 < row["optimizer_ns_median"] < row["engine_ns_median"] for row in rows)
