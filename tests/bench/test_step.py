"""`microadam bench step`: what it writes, what it refuses, and the memory it measures."""

from __future__ import annotations

import json
import weakref
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from microadam_dist import MicroAdam
from microadam_dist.backends.cpu import available_isas
from microadam_dist.bench.contenders import Contender
from microadam_dist.bench.measure import peak_extra_bytes
from microadam_dist.bench.workload import parse_model, parse_numel, parse_setting
from microadam_dist.cli import bench
from microadam_dist.cli.app import app
from microadam_dist.errors import BackendUnavailableError, ConfigError

CPU = torch.device("cpu")
MEGABYTE = 1 << 20

try:
    HAS_KERNEL = bool(available_isas())
except BackendUnavailableError:
    HAS_KERNEL = False
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="the CPU kernel is not installed")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory statistics")


def bench_step(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "step", *arguments])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    sizes, settings = ("--numel", "64K,3x8K"), ("--settings", "10/1%,1/10%", "--isa", "portable", "--in-backward")
    files = ("--json", str(folder / "a.json"), "--plot", str(folder / "a.png"))
    result = bench_step(*sizes, "--dtype", "fp32,bf16", *settings, "--repeats", "2", *files)
    assert result.exit_code == 0, result.output
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    content: dict[str, Any] = json.loads((folder / "a.json").read_text())
    return content


@needs_kernel
def test_a_row_for_every_contender(results: dict[str, Any]) -> None:
    ours = [
        f"MicroAdam {setting} {backend}{how}"
        for backend in ("cpu portable", "reference")
        for setting in ("10/1%", "1/10%")
        for how in ("", " in backward")
    ]
    expected = product(("64K", "3x8K"), ("fp32", "bf16"), ("copy", "AdamW fused", "AdamW foreach", *ours))
    assert [(row["workload"], row["dtype"], row["contender"]) for row in results["rows"]] == list(expected)
    assert "--deepspeed" in results["not_measured"]["DeepSpeedCPUAdam"]
    assert {row["measured"] for row in results["rows"]} == {"in turn"}
    assert results["device"]["threads"] == torch.get_num_threads()
    assert results["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    for row in results["rows"]:
        assert 0 < row["ns_min"] <= row["ns_median"]
        assert row["host_us"] * 1e3 == pytest.approx(row["ns_median"] * row["numel"])  # a step on a CPU has ended
        assert row["numel"] == (65536 if row["workload"] == "64K" else 3 * 8192)
    assert all(row["speedup"] == 1 for row in results["rows"] if row["contender"] == "AdamW fused")


@needs_kernel
def test_bytes_of_one_fused_pass(results: dict[str, Any]) -> None:
    """Gradient, weights in and out, codes and ranges in and out, ten slots of 41 of 4096 in and one out."""
    found = {(row["dtype"], row["contender"]): row["floor_bytes"] for row in results["rows"]}
    window = 41 * (2 + 2) * (10 + 1) / 4096
    assert found["fp32", "MicroAdam 10/1% reference"] == pytest.approx(12 + 1 + 2 * 4 / 64 + window, rel=1e-12)
    assert found["bf16", "MicroAdam 10/1% cpu portable"] == pytest.approx(6 + 1 + 2 * 4 / 64 + window, rel=1e-12)
    assert found["bf16", "MicroAdam 1/10% reference"] == 6 + 1 + 2 * 4 / 64
    assert (found["fp32", "AdamW fused"], found["bf16", "AdamW foreach"], found["bf16", "copy"]) == (28, 14, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "'tpu'"),
        (("--dtype", "fp8"), "'fp8'"),
        (("--numel", "64Q"), "'64Q'"),
        (("--numel", "1000"), "'1000'"),
        (("--model", "9b"), "'9b'"),
        (("--numel", "4096G"), "4096G fp32: the largest of the optimizers needs more"),
        (("--contenders", "Adam8bit,MicroAdam"), "'Adam8bit' is in the name of none of copy, AdamW fused,"),
        (("--settings", "10"), "'10'"),
        (("--settings", "0/1%"), "window_size=0"),
        (("--isa", "sse9"), "sse9"),
        (("--numel", ","), "nothing to measure"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_it_refuses(arguments: tuple[str, ...], message: str) -> None:
    result = bench_step(*arguments)
    assert result.exit_code != 0
    assert message in result.output


@needs_kernel
def test_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the states do not fit memory together; the results say so, and each is gone before the next is made."""
    alive: set[str] = set()

    def made(self: Contender, *args: Any, **kwargs: Any) -> None:
        assert not alive
        original(self, *args, **kwargs)
        alive.add(self.name)
        weakref.finalize(self, alive.discard, self.name)

    original = Contender.__init__
    monkeypatch.setattr(Contender, "__init__", made)
    monkeypatch.setattr(bench, "free_bytes", lambda device: 65536 * 4 * 4)  # weights, gradients and one state of AdamW
    file = tmp_path / "a.json"
    result = bench_step(
        *("--numel", "64K", "--dtype", "fp32", "--settings", "1/10%,2/5%", "--repeats", "2", "--json", str(file)),
        *("--contenders", "microadam,copy", "--no-reference"),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["copy", "AdamW fused", "MicroAdam 1/10% cpu", "MicroAdam 2/5% cpu"]
    assert {row["measured"] for row in rows} == {"one after another"}
    assert all(row["speedup"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_needs_a_device() -> None:
    result = bench_step("--device", "cuda")
    assert result.exit_code == 1
    assert "no CUDA device" in result.output


def test_sizes() -> None:
    assert parse_numel("64M").shapes == ((16384, 4096),)
    assert parse_numel("1000x64k").shapes == ((16, 4096),) * 1000
    assert parse_numel("4096").numel == 4096
    assert parse_model("7b").numel == 6_738_415_616
    assert parse_model("13B").numel == 13_015_864_320
    config = parse_setting("10/0.5%", weight_decay=0.1)
    assert (config.window_size, config.density, config.weight_decay) == (10, 0.005, 0.1)
    assert not config.packed_window
    assert parse_setting("10/1%/packed", weight_decay=0.0).packed_window
    assert [parse_setting(f"1/10%{bits}", weight_decay=0.0).ef_bits for bits in ("", "/ef0", "/ef1.6")] == [4, 0, 1.6]
    nearest = parse_setting("10/1%/packed/nearest", weight_decay=0.0)
    assert nearest.packed_window and nearest.rounding == "nearest"
    assert parse_setting("1/10%/stochastic", weight_decay=0.0).rounding == "stochastic"
    for wrong in ("0x4096", "4097", "M", "-4096", "1.5M"):
        with pytest.raises(ConfigError, match="multiple of 4096"):
            parse_numel(wrong)


@needs_proc
def test_memory_is_seen() -> None:
    taken = peak_extra_bytes(lambda: torch.ones(4 * MEGABYTE).sum(), CPU)  # fp32
    assert taken is not None and 15 * MEGABYTE < taken < 18 * MEGABYTE


@needs_kernel
@needs_proc
@pytest.mark.parametrize("block_size", [4096, 32768])
def test_memory_of_a_step(block_size: int) -> None:
    """The first step takes the state and less than 1 MB a thread, the others only the latter."""
    num_threads = 3
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for numel in (1 << 16, 1 << 23):  # the small one loads what is loaded at first use
            param = torch.randn(numel // 32768, 32768).requires_grad_()
            param.grad = torch.randn_like(param)
            optimizer = MicroAdam([param], block_size=block_size, backend="cpu")
            first = peak_extra_bytes(optimizer.step, CPU)
            later = peak_extra_bytes(optimizer.step, CPU)
    finally:
        torch.set_num_threads(before)
    assert first is not None and later is not None
    state = optimizer.state_bytes().sparse_bytes
    assert state * 0.9 < first < state + num_threads * MEGABYTE
    assert later < num_threads * MEGABYTE
