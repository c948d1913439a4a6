"""The ``microadam`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; it needs typer and rich, which the extra ``cli`` brings."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"microadam: {error.name} is missing; pip install typer rich")
    app(prog_name="microadam")
