"""The narrow interface of a backend, and the choice of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import ConfigError
from ..layout import StateLayout


@dataclass(frozen=True)
class TensorStep:
    """What a backend needs to update one local tensor.

    Attributes:
        param: (numel,) fp32, bf16 or fp16, contiguous; updated in place.
        grad: (numel,) any float dtype, contiguous; only read.
        state: The flat state tensors named in ``layout.tensors``; updated in place.
        layout: Where the blocks lie in all of these.
        step: Steps this tensor has taken before.
    """

    param: Tensor
    grad: Tensor
    state: Mapping[str, Tensor]
    layout: StateLayout
    step: int


class Backend(Protocol):
    """One way to compute the step. All of them produce the same bits."""

    name: str

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
        """Raise if the backend cannot run these settings on this device.

        Raises:
            ConfigError: A setting the backend does not have.
            BackendUnavailableError: Not on this device.
        """

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        """Update all tensors of one group in place.

        Args:
            tensors: The tensors, all with the settings ``config``.
            config: lr, betas, eps and weight decay of this step.
            grad_scale: Factor on every gradient (1 / loss scale).

        Returns:
            Number of blocks skipped because of a non-finite accumulator.
        """


BACKEND_NAMES = ("auto", "reference")


def select_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes the fastest that can run.

    Raises:
        ConfigError: There is no backend of that name.
    """
    if name not in BACKEND_NAMES:
        raise ConfigError(f"backend={name!r}: expected one of {', '.join(BACKEND_NAMES)}.")
    from .reference import ReferenceBackend

    return ReferenceBackend()
