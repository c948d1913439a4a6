"""`microadam_dist.run`: what a script sees, and unchanged DeepSpeed scripts under real launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW = """
import json, sys
from helper import value
assert __name__ == "__main__" and sys.modules["__main__"].value == value
shown = {"argv": sys.argv[1:], "path": sys.path[0], "file": __file__, "annotations": __annotations__}
print(json.dumps(shown | {"script": sys.argv[0]}))
x: int = 1
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    folder.joinpath("helper.py").write_text("value = 3")
    folder.joinpath("show.py").write_text(SHOW)
    folder.joinpath("leave.py").write_text("import sys; sys.exit(7)")
    folder.joinpath("fail.py").write_text("def f():\n    raise ValueError('wrong')\n\nf()\n")
    folder.joinpath("syntax.py").write_text("x = (")
    return tmp_path


@pytest.mark.parametrize("arguments", ["show.py a -m --help", "leave.py", "fail.py", "syntax.py"])
def test_script_sees_and_leaves_what_python_alone_does(scripts: Path, arguments: str) -> None:
    command = f"scripts/{arguments}".split()
    expected, got = python(scripts, *command), python(scripts, "-m", "microadam_dist.run", *command)
    assert (got.returncode, got.stdout, got.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_module_sees_and_leaves_what_python_alone_does(scripts: Path) -> None:
    for command in ("-m show a", "-m leave", "-m fail"):
        folder = scripts / "scripts"
        expected, got = python(folder, *command.split()), python(folder, "-m", "microadam_dist.run", *command.split())
        assert (got.returncode, got.stdout) == (expected.returncode, expected.stdout)
        assert got.stderr.splitlines()[-4:] == expected.stderr.splitlines()[-4:]  # Python's has frames of runpy before


def test_local_rank_of_a_launcher_is_the_scripts(scripts: Path) -> None:
    got = python(scripts, "-m", "microadam_dist.run", "--local_rank=1", "scripts/show.py", "a")
    assert json.loads(got.stdout)["argv"] == ["--local_rank=1", "a"]


def test_accelerate_launch(scripts: Path) -> None:
    """On a CPU it starts one process; on GPUs through torchrun, see below."""
    launch = "-m accelerate.commands.launch --cpu --num_processes 1 -m microadam_dist.run scripts/show.py a"
    assert json.loads(python(scripts, *launch.split()).stdout)["argv"] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("missing.py", "missing.py': No such file"),
        ("", "expected SCRIPT or -m MODULE, got nothing"),
        ("-m", "got -m"),
        ("--steps 3", "got --steps"),
        ("-m missing.part", "no module named 'missing.part'"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path: Path, arguments: str, expected: str) -> None:
    got = python(tmp_path, "-m", "microadam_dist.run", *arguments.split())
    (line,) = got.stderr.splitlines()
    assert got.returncode == 2 and line.startswith("microadam_dist.run: ") and expected in line


def test_help(tmp_path: Path) -> None:
    got = python(tmp_path, "-m", "microadam_dist.run", "--help")
    assert got.returncode == 0 and "SCRIPT [ARGUMENTS]" in got.stdout


# A DeepSpeed script that has never heard of this package.
TRAIN = """
import argparse, json
import deepspeed, deepspeed.ops, torch
deepspeed.ops.__compatible_ops__.update(dict.fromkeys(("deepspeed_shm_comm", "deepspeed_ccl_comm"), False))
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int)
parser.add_argument("--output")
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
x = torch.randn(8, 64)
losses = []
for _ in range(args.steps):
    loss = ((engine(x) - x) ** 2).mean()
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
with open(f"{args.output}.{torch.distributed.get_rank()}", "w") as file:
    json.dump([losses, type(engine.basic_optimizer).__module__, torch.distributed.get_world_size()], file)
"""
PORT = "29517"
LAUNCHERS = {
    "deepspeed": f"deepspeed.launcher.runner --num_gpus 2 --master_port {PORT} --module",
    "torchrun": f"torch.distributed.run --nproc-per-node 2 --master-port {PORT} -m",
}


@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_unchanged_deepspeed_script_trains(tmp_path: Path, launcher: str) -> None:
    # AdamW's params, with another type.
    optimizer = {"type": "microadam", "params": {"lr": 1e-2, "torch_adam": True, "adam_w_mode": True}}
    config = {"train_micro_batch_size_per_gpu": 8, "optimizer": optimizer, "zero_optimization": {"stage": 2}}
    tmp_path.joinpath("config.json").write_text(json.dumps(config))
    tmp_path.joinpath("train.py").write_text(TRAIN)
    command = f"-m {LAUNCHERS[launcher]} microadam_dist.run train.py --steps 20 --output losses"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command.split(), "--deepspeed", "--deepspeed_config", "config.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    ranks = [json.loads(tmp_path.joinpath(f"losses.{rank}").read_text()) for rank in range(2)]
    for losses, module, world_size in ranks:
        assert module.startswith("microadam_dist") and world_size == 2
        assert losses[-1] < losses[0] / 2
    assert "MicroAdam ignores torch_adam, adam_w_mode" in run.stderr
