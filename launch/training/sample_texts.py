"""Real text that every machine with Python and torch has; nothing is downloaded."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}


def stdlib_source(num_chars: int) -> str:
    """Standard library modules, in an order that does not put one package first, until ``num_chars`` are reached."""
    parts, size = [], 0
    for path in _shuffled(Path(sysconfig.get_paths()["stdlib"]), _NOT_SOURCE):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(parts[-1])
        if size >= num_chars:
            break
    return "\n".join(parts)


def python_reference() -> str:
    """The Python reference as `help()` shows it: half a megabyte of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def torch_docstrings(num_chars: int) -> str:
    """Docstrings of torch's modules, in the order of `stdlib_source`, until ``num_chars`` are reached."""
    import torch

    parts, size = [], 0
    for path in _shuffled(Path(torch.__file__).parent, {"__pycache__"}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                parts.append(text)
                size += len(text)
        if size >= num_chars:
            break
    return "\n\n".join(parts)


def _shuffled(root: Path, excluded: set[str]) -> Iterator[Path]:
    modules = [path.relative_to(root) for path in root.rglob("*.py")]
    modules = [path for path in modules if not excluded & set(path.parts)]
    modules.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    return (root / path for path in modules)
