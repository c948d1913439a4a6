"""Run a script that does not know MicroAdam, with the optimizer registered.

    python -m microadam_dist.run SCRIPT [ARGUMENTS]
    python -m microadam_dist.run -m MODULE [ARGUMENTS]

and through a launcher:

    deepspeed --num_gpus 8 --module microadam_dist.run SCRIPT [ARGUMENTS]
    torchrun --nproc-per-node 8 -m microadam_dist.run SCRIPT [ARGUMENTS]
    accelerate launch -m microadam_dist.run SCRIPT [ARGUMENTS]

A DeepSpeed JSON with "type": "MicroAdam" then works in any script, as it is. SCRIPT has to be the one that trains: in
processes that it starts by itself nothing is registered.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn


def main(arguments: Sequence[str]) -> None:
    """Run what the arguments say, as ``python`` would; importing this package has registered the optimizer."""
    # Launchers put it before all arguments, where the script would have found it.
    local_rank = list(itertools.takewhile(re.compile(r"--local[_-]rank=\d+$").match, arguments))
    target, *rest = arguments[len(local_rank) :] or [""]
    if target in ("-h", "--help"):
        print(__doc__)
        return
    is_module = target == "-m" and bool(rest)
    if is_module:
        target, *rest = rest
    elif not target or target.startswith("-"):
        _fail(f"expected SCRIPT or -m MODULE, got {target or 'nothing'}; see --help")
    sys.argv = [target, *local_rank, *rest]
    run = _run_module if is_module else _run_script
    try:
        run(target)
    except Exception as error:
        traceback = _script_frames(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        sys.exit(1)


def _run_script(script: str) -> None:
    path = Path(script).absolute()
    loader = SourceFileLoader("__main__", str(path))
    try:
        source = loader.get_data(str(path))
    except OSError as error:
        _fail(f"can't open file {str(path)!r}: {error.strerror}")
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(path.resolve().parent)
    # Not runpy.run_path: its module is gone when the script ends, before threads and exit handlers do.
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__, module.__loader__ = str(path), loader
    exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)


def _run_module(name: str) -> None:
    try:
        is_there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package it would be in
        is_there = False
    if not is_there:
        _fail(f"no module named {name!r}")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _script_frames(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback without what lies between this file and the script."""
    own = (main.__code__.co_filename, runpy.run_module.__code__.co_filename)
    while traceback is not None and traceback.tb_frame.f_code.co_filename in own:
        traceback = traceback.tb_next
    return traceback


def _fail(message: str) -> NoReturn:
    print(f"microadam_dist.run: {message}", file=sys.stderr)
    sys.exit(2)  # as Python does


if __name__ == "__main__":
    main(sys.argv[1:])
