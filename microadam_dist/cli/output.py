"""What all commands share: an error is one line on standard error, JSON goes to a file or to standard output."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from ..errors import ConfigError, MicroAdamError

STANDARD_OUTPUT = Path("-")

console = Console(stderr=True)

# Click's, or that of the copy of Click in newer versions of typer; both keep it to themselves.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])


class OneLineErrors(TyperGroup):
    """Commands whose errors are one line each, without a trace; exit code 2 for a wrong command line, else 1."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and leave the process."""
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}) or 0)
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # its help has been printed
                sys.exit(2)
            command = error.ctx.command_path if error.ctx else "microadam"
            _fail(f"{error.format_message().rstrip('.')}. See '{command} --help'.", 2)
        except typer.Abort:
            sys.exit(130)
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            _fail(describe(error), 1)
        except MicroAdamError as error:
            _fail(str(error), 1)


def describe(error: OSError) -> str:
    """The file, if the error knows it, and what is wrong."""
    reason = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {reason}" if error.filename is not None else reason


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(OSError):  # standard error may be full, too
        console.print(f"[red]error:[/] {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    sys.exit(code)


def tables(json_file: Path | None) -> Console:
    """Where tables are printed: not between the lines of JSON on standard output."""
    return console if json_file == STANDARD_OUTPUT else Console()


def require_writable(*files: Path | None) -> None:
    """Look at where results are going to be written, before what takes long.

    Raises:
        ConfigError: There is no such folder, or it, or the file, must not be written.
    """
    for file in filter(None, files):
        if file != STANDARD_OUTPUT:
            with _naming(file):
                file = file if file.exists() else file.parent
                if not os.access(file, os.W_OK):
                    file.stat()  # raises if it is not there
                    raise ConfigError(f"{file} cannot be written: choose another place.")


def write_json(content: Any, file: Path) -> None:
    """Write to a file, which is there when it is complete; ``-`` is standard output.

    Raises:
        ConfigError: It cannot be written. What was there before still is.
    """
    text = json.dumps(content, indent=1) + "\n"
    if file == STANDARD_OUTPUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with _naming(file):
        if file.exists() and not file.is_file():  # a pipe, a device
            file.write_text(text, encoding="utf-8")
            return
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """A full disk does not say which file it had no room for."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from None
