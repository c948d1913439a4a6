"""Every fenced block of README and documentation runs, or says in its title what it needs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from microadam_dist import BackendUnavailableError
from tests.launch.snippets import PAGES, SHOWN, Block, blocks, make_workspace, read_json, run_python
from tests.ranks import RankError, run_ranks

BLOCKS = [block for page in PAGES for block in blocks(page) if block.language not in SHOWN]


def of_language(*languages: str) -> pytest.MarkDecorator:
    found = [block for block in BLOCKS if block.language in languages]
    return pytest.mark.parametrize("block", found, ids=str)


@pytest.fixture(autouse=True)
def skip_what_needs_more(request: pytest.FixtureRequest) -> None:
    block: Block | None = getattr(request.node, "callspec", None) and request.node.callspec.params.get("block")
    if block is not None and block.reason_not_to_run:
        pytest.skip(block.reason_not_to_run)


def test_languages_are_known() -> None:
    assert {block.language for block in BLOCKS} <= {"python", "bash", "json", "yaml", "diff"}


@of_language("python")
def test_python(block: Block, tmp_path: Path) -> None:
    missing = sorted(name for name in block.imports if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    try:
        ranks = run_ranks(run_python, block.num_ranks, str(tmp_path), block.code)
    except RankError as error:
        if BackendUnavailableError.__name__ in str(error):
            pytest.skip("needs the compiled CPU kernel")
        raise
    trains = ".step()" in block.code or ".train(" in block.code or ".fit(" in block.code
    assert all(set(stepped) == ({"MicroAdam"} if trains else set()) for stepped in ranks), ranks


@of_language("json")
def test_json(block: Block) -> None:
    check_optimizer(block, "MicroAdam")


def check_optimizer(block: Block, expected: str) -> None:
    """The optimizer of a DeepSpeed configuration can be made."""
    optimizer = read_json(block.code)["optimizer"]
    assert optimizer["type"] == expected
    getattr(torch.optim, expected)([torch.nn.Parameter(torch.ones(64, 64))], **optimizer["params"])


@of_language("diff")
def test_both_sides_of_a_diff(block: Block, tmp_path: Path) -> None:
    for side, optimizer in zip(block.sides, ("AdamW", "MicroAdam"), strict=True):
        if side.language == "json":
            check_optimizer(side, optimizer)
        else:
            run_ranks(run_python, 1, str(tmp_path), side.code)


@of_language("yaml")
def test_yaml(block: Block) -> None:
    assert yaml.safe_load(block.code)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("workspace")
    return folder, make_workspace(folder, sys.executable)


@of_language("bash")
def test_shell(block: Block, workspace: tuple[Path, dict[str, str]]) -> None:
    folder, environment = workspace
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
