"""Where model, tokenizer and text come from: looked at before the hub is asked for what is not on this machine.

Imports neither torch nor transformers, as `options`.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError
from .options import Options

TEXT_SUFFIXES = (".txt", ".md", ".py")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]*){0,2}")
FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*$")


def hub_names(options: Options) -> list[str]:
    """The options whose values are no local files or folders, and may be names on the hub.

    Raises:
        UserError: One can only be a path, and is not there.
    """
    given = [("--model", options.model), ("--tokenizer", options.tokenizer)]
    given += [("--data", source) for source in options.data]
    given += [("--eval-data", source) for source in options.eval_data or ()]
    found = []
    for option, name in given:
        if name is None or (option, name) == ("--tokenizer", "bytes") or (name and Path(name).expanduser().exists()):
            continue
        if is_path(name, is_text="data" in option):
            raise UserError(f"no such file or folder: {option} {name or '(empty)'}")
        found.append(f"{option} {name}")
    return found


def is_path(name: str, is_text: bool) -> bool:
    """Whether this cannot be a name on the hub: it has the form of a path, or lies in a folder that is there."""
    if not HUB_NAME.fullmatch(name):
        return True
    folder = Path(name).parent
    return (folder != Path() and folder.exists()) or (is_text and FILE_SUFFIX.search(name) is not None)
