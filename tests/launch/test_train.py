"""`launch/train.py` with every configuration there is, on two real ranks, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
TINY_LLAMA = {
    **json.loads((ROOT / "configs" / "models" / "byte-llama-1m.json").read_text()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    path.with_name("model.json").write_text(json.dumps(TINY_LLAMA))
    return path


def _train(rank: int, world_size: int, options: dict[str, Any]) -> None:
    # The launch scripts are no package: they import their siblings.
    sys.path.insert(0, str(ROOT / "launch"))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import train
    from settings import Dtype, Exchange, Options

    if "shard_state" in options:
        options["shard_state"] = Exchange(options["shard_state"])
    train.train(Options(**options, dtype=Dtype.pure_bf16 if "pure_bf16" in str(options.get("deepspeed")) else None))


def options(text: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_config": text.with_name("model.json"),
        "tokenizer": "bytes",
        "data": [str(text)],
        "seq_len": 64,
        "steps": 2,
        "output": output,
        **more,
    }


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_deepspeed_config_trains(config: Path, text: Path, tmp_path: Path) -> None:
    run_ranks(_train, 2, options(text, tmp_path, deepspeed=config))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = json.loads(config.read_text())
    assert metrics["optimizer"] == expected["optimizer"]["type"]
    assert metrics["world_size"] == 2
    stage = expected["zero_optimization"]["stage"]
    assert metrics["engine"] == f"ZeRO-{stage}"
    assert math.isfinite(metrics["heldout_after"]) and metrics["heldout_after"] != metrics["heldout_before"]
    copies = 2 if stage == 0 else 1
    if metrics["optimizer"] == "MicroAdam":
        assert metrics["state"]["sparse_bytes_per_param"] < 1.25  # short rows: 1 % is rounded up
        assert metrics["state"]["dense_params"] == copies * 3 * TINY_LLAMA["hidden_size"]
    assert loaded_numel(tmp_path) == metrics["num_params"]


def loaded_numel(folder: Path) -> int:
    """Elements of the saved weights, read as transformers reads them."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


LAUNCHERS = {
    "deepspeed": ["--num_gpus", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_and_command_line(launcher: str, text: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name(launcher)), *LAUNCHERS[launcher], free_port(), str(TRAIN)]
    command += ["--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes", "--data", str(text)]
    command += ["--seq-len", "64", "--steps", "2", "--output", str(tmp_path)]
    command += ["--deepspeed", str(ROOT / "configs" / "deepspeed" / "zero2_bf16.json")]
    # torchrun leaves folders for logs behind, where temporary files go.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sparse path" in result.stdout  # the table at the end
    assert json.loads((tmp_path / "metrics.json").read_text())["world_size"] == 2


def test_a_mistake_is_one_line_and_no_trace(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), "--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes"]
    command += ["--data", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no such file or folder" in result.stderr and "Traceback" not in result.stderr
