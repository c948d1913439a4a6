"""How settings are written on a command line: a density as ``1%`` or as ``0.01``, bits as ``4`` or ``1.6``."""

from __future__ import annotations

import re
from decimal import Decimal

import typer

from ..config import SUPPORTED_EF_BITS

_DECIMAL = re.compile(r"\d+(?:\.\d*)?|\.\d+")


def parse_density(text: str | float) -> float:
    """``"1%"`` and ``"0.01"`` are 0.01; whether it is in its range is the configuration's to say.

    Raises:
        typer.BadParameter: It is no number.
    """
    text = str(text).strip()
    try:
        return float(f"{text[:-1]}e-2" if text.endswith("%") else text)  # not / 100: 0.7% is 0.007
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no fraction: expected a number such as 0.01 or 1%.") from None


def parse_bits(text: str | float) -> float:
    """A whole number is an int, as everywhere.

    Raises:
        typer.BadParameter: It is no number.
    """
    try:
        bits = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number: expected one of {SUPPORTED_EF_BITS}.") from None
    return int(bits) if bits.is_integer() else bits


def with_percent(setting: str) -> str:
    """``"10/0.01/packed"`` as ``"10/1%/packed"``: one name for one setting; other text as it is."""
    window, _, rest = setting.partition("/")
    density, slash, more = rest.partition("/")
    if not _DECIMAL.fullmatch(density):
        return setting
    return f"{window}/{Decimal(density).scaleb(2).normalize():f}%{slash}{more}"
