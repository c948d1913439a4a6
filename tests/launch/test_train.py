"""`launch/train.py` with every configuration there is, on two real ranks, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.disks import mounted_tmpfs, needs_root
from tests.launch.runs import LAUNCH, ROOT, TINY_LLAMA, assert_consistent, loaded_numel, options, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
TRAIN = LAUNCH / "train.py"
CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_deepspeed_config_trains(config: Path, text: Path, tmp_path: Path) -> None:
    run_ranks(train, 2, options(text, tmp_path, deepspeed=config))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = json.loads(config.read_text())
    assert metrics["optimizer"] == expected["optimizer"]["type"]
    assert metrics["world_size"] == 2
    stage = expected["zero_optimization"]["stage"]
    assert metrics["engine"] == f"ZeRO-{stage}"
    assert math.isfinite(metrics["heldout_after"]) and metrics["heldout_after"] != metrics["heldout_before"]
    copies = 2 if stage == 0 else 1  # each rank has all of it, or its shard
    if metrics["optimizer"] == "MicroAdam":
        assert metrics["state"]["sparse_bytes_per_param"] < 1.25 * copies  # short rows: 1 % is rounded up
        assert metrics["state"]["dense_params"] == 3 * TINY_LLAMA["hidden_size"]
        assert_consistent(metrics)
    assert loaded_numel(tmp_path) == metrics["num_params"]


LAUNCHERS = {
    "deepspeed": ["--num_gpus", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_and_command_line(launcher: str, text: Path, tmp_path: Path) -> None:
    from training.environment import free_port

    command = [str(Path(sys.executable).with_name(launcher)), *LAUNCHERS[launcher], str(free_port()), str(TRAIN)]
    command += ["--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes", "--data", str(text)]
    command += ["--seq-len", "64", "--steps", "2", "--output", str(tmp_path)]
    command += ["--deepspeed", str(ROOT / "configs" / "deepspeed" / "zero2_bf16.json")]
    # torchrun leaves folders for logs behind, where temporary files go.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sparse path" in result.stdout  # the table at the end
    assert json.loads((tmp_path / "metrics.json").read_text())["world_size"] == 2


MISTAKES: dict[str, tuple[dict[str, str], str]] = {
    "no data": ({"--data": "none.txt"}, "no such file or folder: --data none.txt"),
    "no model": ({"--model": "./none"}, "no such file or folder: --model ./none"),
    "no text": ({"--data": "{folder}/latin.txt"}, "latin.txt:2: byte 0xe9 is not UTF-8: convert the file first"),
    "no document": ({"--data": "{folder}/type.jsonl"}, "type.jsonl:2: 'text' is a int, expected text"),
    "short": ({"--data": "{folder}/short.txt"}, "has 1 document(s) with 6 tokens in all, and one sequence"),
    "option": ({"--density": "1x"}, "'1x' is no fraction: expected a number such as 0.01 or 1%. See --help."),
    "unknown option": ({"--nonsense": "1"}, "No such option: --nonsense"),
    "DeepSpeed": ({"--deepspeed": "{folder}/ds.json"}, 'ds.json: "bf16" is true, expected an object'),
    "model": ({"--model-config": "{folder}/ds.json"}, "cannot make a causal language model from"),
    "output": ({"--output": "{folder}/short.txt/out"}, "short.txt/out/packed: Not a directory"),
    "full disk": ({"--output": "/dev/full/out"}, "/dev/full/out/packed: Not a directory"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_no_trace(name: str, text: Path, tmp_path: Path) -> None:
    """As a run of its own; the process is one that has imported the libraries."""
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    (tmp_path / "type.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "ds.json").write_text('{"bf16": true}')
    before = sorted(tmp_path.iterdir())
    given = {"--model-config": str(text.with_name("model.json")), "--tokenizer": "bytes", "--data": str(text)}
    given |= {"--output": str(tmp_path / "out"), "--seq-len": "64", "--steps": "1"}
    changed, message = MISTAKES[name]
    if "--model" in changed:
        del given["--model-config"]
    given |= {option: value.format(folder=tmp_path) for option, value in changed.items()}
    ((code, output),) = run_ranks(_main, 1, [part for pair in given.items() for part in pair])
    (line,) = output.splitlines()
    assert line.startswith("Error: ") and message in line and code == 2
    assert sorted(path for path in tmp_path.iterdir() if path.name != "out") == before


@needs_root
@pytest.mark.parametrize(
    ("size", "message"),
    [("64k", "packed/train.npy cannot be written: "), ("600k", "no space left on its disk")],  # packing, saving
)
def test_a_full_disk_is_one_line_and_no_trace(size: str, message: str, text: Path, tmp_path: Path) -> None:
    arguments = ["--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes", "--data", str(text)]
    arguments += ["--seq-len", "64", "--steps", "2", "--save-steps", "1"]
    with mounted_tmpfs(tmp_path / "disk", size) as disk:
        ((code, output),) = run_ranks(_main, 1, [*arguments, "--output", str(disk / "out")])
        assert code == 2 and not list(disk.rglob("*.tmp.npy"))
    (line,) = (line for line in output.splitlines() if "Error: " in line)
    assert message in line and str(tmp_path / "disk" / "out") in line and "Traceback" not in output


def _main(rank: int, world_size: int, arguments: list[str]) -> tuple[int, str]:
    import typer
    from typer.testing import CliRunner

    import train
    from training.errors import OneLineErrors

    torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=OneLineErrors)(train.main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "bad.jsonl:1: 'response' is missing among ['question']"),  # said by the rank that reads
        (["--dtype", "fp8"], "'fp8' is not one of"),  # by all
        (["--clip", "1", "--gradient-release"], "--gradient-release is for one process"),
    ],
)
def test_ranks_say_it_once(more: list[str], message: str, text: Path, tmp_path: Path) -> None:
    from training.environment import free_port

    (tmp_path / "bad.jsonl").write_text('{"question": 1}')
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), str(TRAIN), "--model-config", str(text.with_name("model.json"))]
    command += ["--tokenizer", "bytes", "--data", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "out"), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    (line,) = (line for line in result.stderr.splitlines() if message in line)
    assert line.startswith("Error: ")
    assert "train.npy" not in result.stderr  # which the other rank would look for


@pytest.mark.parametrize(
    ("optimizer", "config_type", "lr"),
    [(None, None, 6e-5), ("adamw", None, 2e-5), (None, "microadam", 6e-5), (None, "AdamW", 2e-5)],
)
def test_default_learning_rate_is_the_optimizers(
    optimizer: str | None, config_type: str | None, lr: float, text: Path, tmp_path: Path
) -> None:
    from training.options import OptimizerName, Options, Rounding, resolve

    given: dict[str, object] = {"optimizer": OptimizerName(optimizer) if optimizer else None}
    if config_type:
        params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": config_type, "params": params}}))
        given["deepspeed"] = tmp_path / "ds.json"
    if config_type == "microadam":
        given["rounding"] = Rounding.nearest
    resolved, config = resolve(Options(**options(text, tmp_path), **given))
    assert resolved.lr == lr and resolved.warmup == 0.1
    if config is not None:
        assert config["optimizer"]["params"]["lr"] == lr
        assert config["optimizer"]["params"].get("rounding") == ("nearest" if config_type == "microadam" else None)
