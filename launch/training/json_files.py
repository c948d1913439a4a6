"""JSON that users write: what is wrong in it is said by file and name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: got a {type(content).__name__}, expected a JSON object")
    return content


def read_deepspeed(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON; the parts of it that are read here have the form that DeepSpeed wants.

    Raises:
        UserError: they have another one, or it is no JSON.
    """
    config = read_json(path)
    sections = {name: config[name] for name in ("optimizer", "bf16", "fp16", "zero_optimization") if name in config}
    if isinstance(optimizer := sections.get("optimizer"), dict) and "params" in optimizer:
        sections["optimizer.params"] = optimizer["params"]
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f'{path}: "{name}" is {json.dumps(section)}, expected an object')
    for name in ("bf16", "fp16"):
        if (enabled := config.get(name, {}).get("enabled", False)) not in (True, False, "auto"):
            raise UserError(f'{path}: "{name}.enabled" is {json.dumps(enabled)}, expected true, false or "auto"')
    return config


def read_number(path: Path, keys: Sequence[str], value: Any, kind: type) -> Any:
    """What a JSON states under some keys, as a float, an int or (tuple) two floats; quotes around it do not matter.

    Raises:
        UserError: it is something else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        if kind is tuple:
            first, second = value
            return float(first), float(second)
        if kind(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        expected = {tuple: "two numbers", int: "a whole number", float: "a number"}[kind]
        raise UserError(f'{path}: "{".".join(keys)}" is {json.dumps(value)}, expected {expected}') from None
