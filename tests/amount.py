"""How many cases a random test draws: a tenth of all. `MICROADAM_TEST_ALL=1 bash launch/test.sh` draws all."""

from __future__ import annotations

import os

IS_ALL = os.environ.get("MICROADAM_TEST_ALL") == "1"


def amount(of_all: int) -> int:
    """``of_all``, or a tenth."""
    return of_all if IS_ALL else of_all // 10
