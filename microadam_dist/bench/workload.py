"""What a step is measured on: shapes, and tensors of these shapes with gradients that change."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..config import ROUNDINGS, MicroAdamConfig
from ..errors import ConfigError
from ..planner.shapes import BUILT_IN_NAMES, LLAMAS

ROW_NUMEL = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_NUMEL = re.compile(r"(?:(\d+)x)?(\d+)([KMG]?)", re.IGNORECASE)
_SETTING = re.compile(rf"(\d+)/(\d+(?:\.\d+)?)%(/packed)?(?:/({'|'.join(ROUNDINGS)}))?(?:/ef(\d(?:\.\d)?))?")


@dataclass(frozen=True)
class Workload:
    """Parameter shapes and what they are called in the results."""

    name: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(map(math.prod, self.shapes))


def parse_numel(text: str) -> Workload:
    """``"64M"`` is one matrix of 64 x 2**20 elements, ``"1000x64K"`` a thousand of 64 x 2**10.

    Raises:
        ConfigError: The text is something else, or no whole number of rows of `ROW_NUMEL` elements.
    """
    match = _NUMEL.fullmatch(text)
    count, numel = (int(match[1] or 1), int(match[2]) * _UNITS[match[3].upper()]) if match else (0, 0)
    if count < 1 or numel < ROW_NUMEL or numel % ROW_NUMEL:
        raise ConfigError(
            f"numel {text!r}: expected a multiple of {ROW_NUMEL} such as 64M or 256K (K is 2**10, M is 2**20, "
            "G is 2**30), or several tensors such as 1000x64K."
        )
    return Workload(text, ((numel // ROW_NUMEL, ROW_NUMEL),) * count)


def parse_model(text: str) -> Workload:
    """The tensors of a Llama: ``"7b"``, ``"13b"``, ``"8b"``.

    Raises:
        ConfigError: The planner does not know the model.
    """
    name = BUILT_IN_NAMES.get(text.lower())
    if name is None:
        raise ConfigError(f"model {text!r}: expected one of {', '.join(BUILT_IN_NAMES)}.")
    return Workload(name, tuple(LLAMAS[name].parameters().values()))


def parse_dtype(text: str) -> torch.dtype:
    """``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Raises:
        ConfigError: It is none of these.
    """
    if text not in DTYPES:
        raise ConfigError(f"dtype {text!r}: expected one of {', '.join(DTYPES)}.")
    return DTYPES[text]


def parse_setting(text: str, weight_decay: float) -> MicroAdamConfig:
    """``"10/1%"`` is window_size 10, density 0.01; after it, if wanted, ``/packed``, ``/nearest`` and ``/ef2``.

    Raises:
        ConfigError: The text is something else, or a value is outside its range.
    """
    match = _SETTING.fullmatch(text)
    if not match:
        raise ConfigError(
            f"setting {text!r}: expected window_size/density such as 10/1%, and then, if wanted, /packed, one of "
            f"{', '.join('/' + name for name in ROUNDINGS)}, and /ef with the bits of the error feedback, such as /ef2."
        )
    bits = float(match[5] or 4)
    return MicroAdamConfig(
        window_size=int(match[1]),
        density=float(Fraction(match[2]) / 100),
        packed_window=bool(match[3]),
        rounding=match[4] or "auto",
        ef_bits=int(bits) if bits.is_integer() else bits,
        weight_decay=weight_decay,
    )


class Tensors:
    """Parameters and gradients of a workload, normally distributed.

    Args:
        workload: Their shapes.
        dtype: Of both.
        device: Where they lie.
    """

    _NUM_SHIFTS, _SHIFT = 16, 1024

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        pool_numel = workload.numel + self._NUM_SHIFTS * self._SHIFT
        self.params = [
            torch.randn(shape, dtype=dtype, device=device, generator=generator).requires_grad_()
            for shape in workload.shapes
        ]
        self.numel = workload.numel
        self._pool = torch.randn(pool_numel, dtype=dtype, device=device, generator=generator)

    def gradients(self, step: int) -> list[Tensor]:
        """Other gradients than in the steps before, in the same memory: every coordinate gets another value."""
        start = step % self._NUM_SHIFTS * self._SHIFT
        ends = start + torch.tensor([0, *(p.numel() for p in self.params)]).cumsum(0)
        pieces = self._pool.tensor_split(ends)[1:-1]
        return [piece.view(p.shape) for piece, p in zip(pieces, self.params, strict=True)]
