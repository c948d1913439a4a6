"""`microadam reshard`: DeepSpeed's own load_checkpoint reads what it writes, on the new number of ranks."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import microadam_dist
from microadam_dist import CheckpointMismatchError, ConfigError
from microadam_dist.checkpoint.deepspeed_files import load_file
from microadam_dist.checkpoint.deepspeed_reshard import reshard_checkpoint
from tests.deepspeed.engines import (
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.disks import mounted_tmpfs, needs_root
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero2": (2, {}),
    "zero3": (3, {"zero_optimization": {"sub_group_size": 7000}}),
}


def new_engine(name: str) -> Any:
    """Two groups, a frozen parameter and a buffer."""
    stage, extra = CONFIGS[name]
    model = make_model()
    model.register_buffer("counts", torch.zeros(5))
    model.frozen = nn.Linear(7, 3)
    model.frozen.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return initialize(model, make_config(stage, torch.bfloat16, **extra), model_parameters=groups)


def _save(rank: int, world_size: int, folder: str) -> None:
    for name in CONFIGS:
        engine = new_engine(name)
        train(engine, make_gradients(6, torch.bfloat16))
        engine.module.counts.fill_(4)
        engine.save_checkpoint(os.path.join(folder, name))
        engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-2-ranks")
    run_ranks(_save, 2, str(folder))
    return folder


def _load_both_ways(rank: int, world_size: int, saved: str, resharded: str) -> list[bool]:
    same = []
    for name in CONFIGS:
        native, elastic = new_engine(name), new_engine(name)
        native.load_checkpoint(f"{resharded}/{name}")
        microadam_dist.deepspeed.load_checkpoint(elastic, f"{saved}/{name}")
        assert native.global_steps == elastic.global_steps == 6
        for engine in (native, elastic):
            assert engine.module.counts.tolist() == [4] * 5
        states = [list(base_optimizer(engine).state.values()) for engine in (native, elastic)]
        equal = all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in b)
        for _ in range(2):  # as loaded, and after two more steps
            weights = full_weights(native), full_weights(elastic)
            equal = equal and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
            train(native, make_gradients(2, torch.bfloat16))
            train(elastic, make_gradients(2, torch.bfloat16))
        same.append(equal)
    return same


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_native_load_of_resharded_files_equals_elastic_load(world_size: int, saved: Path, tmp_path: Path) -> None:
    for name in CONFIGS:
        done: list[tuple[str, int, int]] = []
        reshard_checkpoint(saved / name, tmp_path / name, world_size, progress=lambda *p, done=done: done.append(p))
        assert done[-1][0] == "verifying" and done[-1][1] == done[-1][2]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["zero2", "zero3"]  # nothing temporary is left
    assert run_ranks(_load_both_ways, world_size, str(saved), str(tmp_path)) == [[True, True]] * world_size


def test_padding_may_hold_anything(saved: Path, tmp_path: Path) -> None:
    """DeepSpeed does not set the end of the last shard: it may be NaN."""
    shutil.copytree(saved / "zero3", tmp_path / "old")
    (last,) = (tmp_path / "old").glob("*/*rank_1_mp_rank_00_optim_states.pt")
    state = torch.load(last, weights_only=False)
    for flat in state["optimizer_state_dict"]["fp32_flat_groups"]:
        flat.data[-1] = math.nan
    torch.save(state, last)
    reshard_checkpoint(tmp_path / "old", tmp_path / "new", 3)


def test_command_line(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from microadam_dist.cli import main; main()", "reshard", str(saved / "zero2")]
    command += [str(tmp_path / "new"), "--world-size", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 ranks, verified" in result.stderr
    assert len(list((tmp_path / "new").glob("*/*optim_states.pt"))) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr == f"error: {tmp_path / 'new'} exists already; give a new folder.\n"


def test_nothing_is_left_of_a_failed_write(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microadam_dist.checkpoint.deepspeed_reshard._verify", _raise)
    with pytest.raises(KeyboardInterrupt):
        reshard_checkpoint(saved / "zero2", tmp_path / "new", 4)
    with pytest.raises(ConfigError, match="at least 1"):
        reshard_checkpoint(saved / "zero2", tmp_path / "new", 0)
    assert list(tmp_path.iterdir()) == []


def _raise(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    """A process that may die: a map on a full disk would end this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


def _refused(source: Path, target: Path, file_bytes: int | None) -> str | None:
    """What is said; None if there was room."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if file_bytes is None else file_bytes, hard))
        reshard_checkpoint(source, target, 3)
    except ConfigError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


@needs_root
@pytest.mark.parametrize("name", CONFIGS)
def test_a_full_disk_is_refused(name: str, saved: Path, worker: ProcessPoolExecutor, tmp_path: Path) -> None:
    """From no room at all to enough, so that it ends in every phase of the work."""
    before = _digest(saved / name)
    with mounted_tmpfs(tmp_path / "disk", "64k") as disk:
        said = []
        for size in range(64, 4096, 32):
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            message = worker.submit(_refused, saved / name, disk / "a" / "new", None).result()
            if message is None:
                break
            said.append(message)
            assert not list(disk.iterdir())
        assert (disk / "a" / "new" / "latest").is_file()
        assert "MiB while it is made, and 0.1 MiB are free" in said[0]
        assert any("new cannot be written: No space left on device. Nothing was left behind" in line for line in said)
    assert _digest(saved / name) == before


def test_a_file_that_cannot_grow_is_refused(saved: Path, worker: ProcessPoolExecutor, tmp_path: Path) -> None:
    """As with a quota, where the disk has room."""
    sizes = [path.stat().st_size for path in (saved / "zero2").rglob("*.pt")]
    for limit in (4096, min(sizes) // 2, max(sizes) // 2):
        message = worker.submit(_refused, saved / "zero2", tmp_path / "new", limit).result()
        assert message is not None and f"{tmp_path / 'new'} cannot be written: " in message
        assert not list(tmp_path.iterdir())


@needs_root
def test_a_read_only_disk_is_refused(saved: Path, tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "64m", "ro") as disk, pytest.raises(ConfigError, match="Read-only file"):
        reshard_checkpoint(saved / "zero2", disk / "new", 3)


class _RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    file, ran = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "ran"
    torch.save({"client": _RunsCode(ran)}, file)
    with pytest.raises(CheckpointMismatchError, match=r"holds objects of .*Use plain values"):
        load_file(file)
    assert not ran.exists()
