"""`launch/train.py` with every configuration there is, on two real ranks, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.runs import LAUNCH, ROOT, TINY_LLAMA, loaded_numel, options, train
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
    copies = 2 if stage == 0 else 1
    if metrics["optimizer"] == "MicroAdam":
        assert metrics["state"]["sparse_bytes_per_param"] < 1.25  # short rows: 1 % is rounded up
        assert metrics["state"]["dense_params"] == copies * 3 * TINY_LLAMA["hidden_size"]
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


def test_a_mistake_is_one_line_and_no_trace(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TRAIN), "--model-config", str(text.with_name("model.json")), "--tokenizer", "bytes"]
    command += ["--data", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no such file or folder" in result.stderr and "Traceback" not in result.stderr


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
