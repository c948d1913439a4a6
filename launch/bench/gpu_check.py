"""Checks the CUDA backend on this machine, the sanitizers first, then measures its step. Prints a table, writes JSON.

PYTHONPATH=. python launch/bench/gpu_check.py --output runs/gpu_check.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.cuda import CudaBackend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.layout import WINDOW_TENSORS, ShardSpan, StateLayout

ROOT = Path(__file__).parents[2]
BITS = "bit_identical or 16_bit or many_tensors or more_than"
CHECKS = {
    "sanitizers": "test_sanitizer",
    "bit equality": BITS,
    "streams, graphs": f"not test_sanitizer and not ({BITS})",
}
SETTINGS = ((10, 0.01), (2, 0.05), (1, 0.1))  # window_size, density
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # repeated to the size wanted


def run_checks(name: str, expression: str, folder: Path) -> dict[str, Any]:
    """Run a part of tests/gpu."""
    report = folder / f"{name.replace(' ', '_').replace(',', '')}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-k", expression, f"--junitxml={report}"]
    start = time.monotonic()
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (report.with_suffix(".log")).write_text(run.stdout + run.stderr)
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    return {"check": name, **counts, "failed": failed, "seconds": round(time.monotonic() - start, 1)}


def moved_bytes(tensors: list[TensorStep]) -> int:
    """Bytes a step has to move: gradient and window read, a slot written, weights and error feedback both."""
    total = 0
    for tensor in tensors:
        total += tensor.grad.nbytes + 2 * tensor.param.nbytes
        window = sum(tensor.state[name].nbytes for name in WINDOW_TENSORS if name in tensor.state)
        total += window + window // tensor.layout.config.window_size
        total += 2 * sum(tensor.state[name].nbytes for name in ("codes", "bucket_lo", "bucket_hi"))
    return total


def measure(window_size: int, density: float, dtype: torch.dtype, numel: int, repeats: int) -> dict[str, Any]:
    """Median time of a step on about ``numel`` parameters in weight matrices of a Llama."""
    config = MicroAdamConfig(window_size=window_size, density=density, lr=1e-4, weight_decay=0.01)
    tensors: list[TensorStep] = []
    while sum(tensor.param.numel() for tensor in tensors) < numel:
        rows, cols = SHAPES[len(tensors) % len(SHAPES)]
        layout = StateLayout((ShardSpan(str(len(tensors)), (rows, cols), 0, rows * cols),), config)
        param = torch.randn(rows * cols, device="cuda", dtype=dtype)
        tensors.append(TensorStep(param, torch.randn_like(param), allocate_state(layout, param.device), layout, 0))
    backend = CudaBackend()
    times = []
    for step in range(repeats + window_size + 2):
        now = [TensorStep(t.param, t.grad, t.state, t.layout, step) for t in tensors]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        backend.step(now, config, 1.0)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    total = sum(tensor.param.numel() for tensor in tensors)
    milliseconds = statistics.median(times[window_size + 2 :])
    return {
        "window_size": window_size,
        "density": density,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": total,
        "ms": round(milliseconds, 4),
        "ns_per_parameter": round(milliseconds * 1e6 / total, 5),
        "GB_per_s": round(moved_bytes(tensors) / milliseconds / 1e6, 1),
    }


def copy_bandwidth(repeats: int) -> float:
    """GB/s of a copy on the device, bytes read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return round(2 * source.nbytes / statistics.median(times) / 1e6, 1)


def main() -> None:
    """Run the checks, then the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check.json"))
    parser.add_argument("--numel", type=int, default=500_000_000, help="parameters of the measured step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--skip-checks", action="store_true")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)

    result: dict[str, Any] = {
        "torch": torch.__version__,
        "backend": CudaBackend().describe(),
        "checks": [],
        "steps": [],
    }
    print(f"torch {torch.__version__}; {result['backend']}", flush=True)
    for name, expression in {} if arguments.skip_checks else CHECKS.items():
        check = run_checks(name, expression, arguments.output.parent)
        result["checks"].append(check)
        passed = check["tests"] - check["failures"] - check["errors"] - check["skipped"]
        print(f"{name:16} {passed} passed, {check['skipped']} skipped, failed: {check['failed']}", flush=True)
        arguments.output.write_text(json.dumps(result, indent=1))
    result["copy_GB_per_s"] = copy_bandwidth(arguments.repeats)
    print(f"copy {result['copy_GB_per_s']} GB/s")
    print(f"{'window':>6} {'density':>8} {'dtype':>9} {'ms':>9} {'ns/param':>9} {'GB/s':>8}")
    for dtype in (torch.bfloat16, torch.float32):
        for window_size, density in SETTINGS:
            row = measure(window_size, density, dtype, arguments.numel, arguments.repeats)
            result["steps"].append(row)
            numbers = f"{row['ms']:9.3f} {row['ns_per_parameter']:9.5f} {row['GB_per_s']:8.1f}"
            print(f"{window_size:6} {density:8} {row['dtype']:>9} {numbers}", flush=True)
            arguments.output.write_text(json.dumps(result, indent=1))
    if any(check["failed"] for check in result["checks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
