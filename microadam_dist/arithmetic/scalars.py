"""The scalars of one step, the same for every backend. Standard library only."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..config import MicroAdamConfig

# Ours: a block whose accumulator holds a NaN, an Inf or a magnitude of 2**60 or more (after rounding to bf16) is
# skipped. Below it no product, square or bucket range of the step can overflow, so no NaN can enter the state.
MAGNITUDE_LIMIT = 2.0**60


def round_to_fp32(numbers: Sequence[float]) -> tuple[float, ...]:
    """The fp32 numbers nearest to float64 ones; together, because most of the time is that of the call."""
    form = f"{len(numbers)}f"
    return struct.unpack(form, struct.pack(form, *numbers))


class BiasFactors(NamedTuple):
    """Factors that depend on the number of the step, in float64.

    Attributes:
        m_factor, v_factor: (1 - b1) / (1 - b1^n) and the same with b2 (window sums to moments). By ``correction``,
            n is the number of slots in the window, min(t, window_size): the factors divide by what the slots weigh
            together, and a coordinate with a steady gradient moves by lr. Or n is t, as in the paper: with window 1
            that coordinate moves by lr * (1 - b1) / (1 - b1^t) * sqrt((1 - b2^t) / (1 - b2)), with the default betas
            lr / 2 at t = 10, lr at 100, 2.5 lr at 1000 and 3.2 lr in the end.
        m_correction, v_correction: 1 / (1 - b1^t) and the same with b2 (dense path).
    """

    m_factor: float
    v_factor: float
    m_correction: float
    v_correction: float

    @classmethod
    def at(cls, step: int, config: MicroAdamConfig) -> BiasFactors:
        """Of the update that follows ``step`` finished ones, t = step + 1."""
        beta1, beta2 = config.betas
        t = step + 1
        n = min(t, config.window_size) if config.correction == "window" else t
        return cls((1 - beta1) / (1 - beta1**n), (1 - beta2) / (1 - beta2**n), 1 / (1 - beta1**t), 1 / (1 - beta2**t))


@dataclass(frozen=True)
class StepScalars:
    """The scalars of one step, each rounded once from float64 to fp32.

    Attributes:
        grad_scale: Factor on the gradient (1 / loss scale).
        decay: 1 - lr * weight_decay.
        m_weights, v_weights: b1^r and b2^r by age r, 0 = newest; as many as there are valid slots.
        m_factor, v_factor, m_correction, v_correction: See `BiasFactors`.
    """

    lr: float
    eps: float
    decay: float
    grad_scale: float
    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    m_weights: tuple[float, ...]
    v_weights: tuple[float, ...]
    m_factor: float
    v_factor: float
    m_correction: float
    v_correction: float

    @classmethod
    def at(cls, step: int, config: MicroAdamConfig, grad_scale: float) -> StepScalars:
        """Scalars of the update that follows ``step`` finished ones."""
        ages = range(min(step + 1, config.window_size))
        beta1, beta2 = config.betas
        numbers = {
            "lr": config.lr,
            "eps": config.eps,
            "decay": 1 - config.lr * config.weight_decay,
            "grad_scale": grad_scale,
            "beta1": beta1,
            "beta2": beta2,
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            **BiasFactors.at(step, config)._asdict(),
        }
        return cls(
            m_weights=round_to_fp32([beta1**age for age in ages]),
            v_weights=round_to_fp32([beta2**age for age in ages]),
            **dict(zip(numbers, round_to_fp32(list(numbers.values())), strict=True)),
        )
