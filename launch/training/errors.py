"""What a user has done wrong, and how it is said: once, in one line, without a stack trace."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

# Click's, or that of the copy of Click in newer versions of typer; both keep it to themselves.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])

PATIENCE_SECONDS = 10.0


class UserError(Exception):
    """A mistake that the message alone explains: shown without a stack trace."""


class OneLineErrors(TyperCommand):
    """A command whose mistaken options are named in one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and leave the process."""
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except _UsageError as error:
            fail(f"{error.format_message().rstrip('.')}. See --help.")
        except typer.Abort:
            sys.exit(130)


def fail(message: str, everywhere: bool = False) -> NoReturn:
    """Leave with exit code 2, and say why, once.

    The first rank says it, and its launcher then ends the others, which wait for that: one that left earlier would have
    the first rank ended before it has spoken.

    Args:
        message: What all ranks have to say, as far as they know.
        everywhere: Only this rank has to say it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if not everywhere:
            time.sleep(PATIENCE_SECONDS)
            if _know_each_other():
                sys.exit(2)
        message = f"rank {rank}: {message}"
    line = escape(" ".join(message.split()))
    Console(stderr=True).print(f"[bold red]Error:[/] {line}", highlight=False, soft_wrap=True)
    sys.exit(2)


def _know_each_other() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()
