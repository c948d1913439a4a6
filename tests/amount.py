"""How many cases the long tests take: a part, and with `MICROADAM_TEST_ALL=1 bash launch/test.sh` all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

IS_ALL = os.environ.get("MICROADAM_TEST_ALL") == "1"


def amount(of_all: int) -> int:
    """Of random cases: ``of_all``, or a tenth."""
    return of_all if IS_ALL else of_all // 10


def some(cases: Iterable[T]) -> list[T]:
    """All cases of a table, or every fifth."""
    return list(cases)[:: 1 if IS_ALL else 5]
