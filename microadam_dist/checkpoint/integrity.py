"""Whether files are as they were written: `torch.save` stores checksums that `torch.load` does not compare."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

from ..errors import CheckpointMismatchError


def require_intact(file: Path | IO[bytes], title: str) -> None:
    """Read all of what `torch.save` has written, and compare it with its checksums.

    Args:
        file: A path, or an open file with nothing else in it.
        title: What it is, for the message.

    Raises:
        CheckpointMismatchError: It is cut off, a bit in it has changed, or it is something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f"{title} cannot be read, it is truncated or no checkpoint: {error}. Copy it again, or load an earlier one."
        ) from error
    if damaged is not None:
        raise CheckpointMismatchError(
            f"{title} is damaged: the checksum of {damaged} in it is wrong. Copy it again, or load an earlier one."
        )
