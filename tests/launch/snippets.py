"""The fenced blocks of README and documentation, and how they are run.

A title "on N ranks" or "needs ..." in the line that opens a block says on how many, or why it is not run.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.launch.runs import ROOT
from tests.text import tiny_llama

PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "launch/site/pages").glob("*.md"))]
SHOWN = ("text", "bibtex")  # nothing to run
_FENCE = re.compile(r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One fenced block."""

    page: str
    line: int
    language: str
    title: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def num_ranks(self) -> int:
        """Of a Python block."""
        found = re.search(r"on (\d+) ranks", self.title)
        return int(found[1]) if found else 1

    @property
    def reason_not_to_run(self) -> str | None:
        """What it needs that no test has."""
        found = re.search(r"needs .*", self.title)
        return found[0] if found else None

    @property
    def imports(self) -> set[str]:
        """The packages that a Python block imports."""
        nodes = list(ast.walk(ast.parse(self.code)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return {name.partition(".")[0] for name in names}

    @property
    def sides(self) -> list[Block]:
        """A diff as it was and as it is, in the language of what it changes."""
        lines = self.code.splitlines()
        language = "json" if '"' in lines[0] else "python"
        sides = ["\n".join(line[1:] for line in lines if not line.startswith(mark)) for mark in "+-"]
        return [self._replace(language=language, code=side) for side in sides]


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page.

    Raises:
        ValueError: A fence that is not understood, as one without a language.
    """
    text = (ROOT / page).read_text()
    found = list(_FENCE.finditer(text))
    if 2 * len(found) != len(re.findall(r"^\s*(?:```|~~~)", text, re.M)):
        raise ValueError(f'{page}: a fence that is not ```LANGUAGE or ```LANGUAGE title="..." at a line\'s begin')
    for match in found:
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], match["title"] or "", match["code"])


def names() -> dict[str, Any]:
    """What a Python block may use without making it."""
    from training.packing import byte_tokenizer

    tokens = torch.arange(64).repeat(2, 1)
    return {
        "model": tiny_llama(),
        "tokenizer": byte_tokenizer(),
        "batch": {"input_ids": tokens, "labels": tokens},
        "dataset": [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)],
        "device": torch.device("cpu"),
    }


def run_python(rank: int, world_size: int, folder: str, code: str) -> list[str]:
    """Run a block on a rank; returns the types of the optimizers that have stepped, in order."""
    from microadam_dist.deepspeed import disable_shm_allreduce

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", DS_ACCELERATOR="cpu", LOCAL_WORLD_SIZE=str(world_size))
    disable_shm_allreduce()
    os.chdir(folder)
    stepped: list[str] = []

    def note(optimizer: Optimizer, *_: Any) -> None:
        stepped.append(type(optimizer).__name__)

    register_optimizer_step_post_hook(note)
    exec(compile(code, "snippet", "exec", dont_inherit=True), names() | {"__name__": "snippet"})
    return stepped


def read_json(code: str) -> dict[str, Any]:
    """A block that is one entry of a configuration, or all of it."""
    content: dict[str, Any] = json.loads(code if code.startswith("{") else f"{{{code}}}")
    return content


def make_workspace(folder: Path, python: str) -> dict[str, str]:
    """What the shell blocks find in their folder; returns their environment."""
    from training.packing import byte_tokenizer

    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    tiny_llama().save_pretrained(folder / "path/to/model")
    byte_tokenizer().save_pretrained(folder / "path/to/model")
    lines = [f"Line {i}: the quick brown fox jumps over the lazy dog." for i in range(200)]
    (folder / "book.txt").write_text("\n".join(lines))
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    commands = folder / "bin"
    commands.mkdir()
    for name, call in {"python": "", "microadam": "-c 'from microadam_dist.cli import main; main()'"}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{python}" {call} "$@"\n')
        (commands / name).chmod(0o755)
    return {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
