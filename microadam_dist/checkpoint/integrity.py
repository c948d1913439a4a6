"""Whether files are as they were written: `torch.save` stores checksums that `torch.load` does not compare."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..errors import CheckpointMismatchError

_DIRECTORY = 0x10  # of the attributes of a record: torch would read nothing for it, and leave its memory as it was


def require_intact(file: Path | IO[bytes], title: str) -> None:
    """Read all of what `torch.save` has written, and compare it with its checksums.

    Args:
        file: A path, or an open file with nothing else in it.
        title: What it is, for the message.

    Raises:
        CheckpointMismatchError: It is cut off, a bit in it has changed, or it is something else.
    """
    with _reading(title), zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        directories = [record.filename for record in archive.infolist() if record.external_attr & _DIRECTORY]
        if damaged is not None or directories:
            reason = f"the checksum of {damaged}" if damaged is not None else f"the entry of {directories[0]}"
            raise CheckpointMismatchError(
                f"{title} is damaged: {reason} in it is wrong. Copy it again, or load an earlier one."
            )


def require_intact_pickle(path: Path) -> str:
    """Compare only what `torch.load` runs with its checksum, not the tensors.

    Returns:
        The name, without its suffix, under which `torch.save` wrote the file; "archive" if that is unknown.

    Raises:
        CheckpointMismatchError: As `require_intact`.
    """
    with _reading(str(path)), zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        archive.read(name)
        return name.partition("/")[0]


@contextlib.contextmanager
def _reading(title: str) -> Iterator[None]:
    """What zipfile raises for what it cannot make sense of, which is much, as a CheckpointMismatchError."""
    try:
        yield
    except CheckpointMismatchError:
        raise
    except Exception as error:
        raise CheckpointMismatchError(
            f"{title} cannot be read, it is truncated or no checkpoint: {error}. Copy it again, or load an earlier one."
        ) from error
