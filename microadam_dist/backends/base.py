"""The interface of a backend: the whole fused step over all tensors of a group, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..layout import StateLayout


class TensorStep(NamedTuple):
    """What a backend needs to update one local tensor; all tensors are contiguous, of any shape.

    Attributes:
        param: fp32, bf16 or fp16; updated in place.
        grad: As many elements, of any float dtype; only read. None: only the weights are updated, from a window whose
            newest slot has been put there, and ``state`` needs no more than that window; not for the dense path.
        state: The state tensors named in ``layout.tensors``; updated in place. It may hold others.
        layout: Where the blocks lie in all of these.
        step: Steps this tensor has taken before.
        counter: 0-dim int64, or None; 1 is added. `CapturableBackend.step_on_device` reads ``step`` from it, on the
            device.
    """

    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    layout: StateLayout
    step: int
    counter: Tensor | None = None


class Backend(Protocol):
    """One way to compute the step. All of them produce the same bits."""

    name: str

    def check(self, device: torch.device) -> None:
        """Raise a BackendUnavailableError if the backend cannot update parameters on this device."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int | Tensor:
        """Update all tensors of one group in place.

        Args:
            tensors: The tensors, all with the settings ``config``.
            config: lr, betas, eps and weight decay of this step.
            grad_scale: Factor on every gradient (1 / loss scale).

        Returns:
            Number of blocks skipped because of a non-finite accumulator; a 0-dim integer tensor on the device where
            reading it would wait for the device.
        """


@dataclass(frozen=True)
class DeviceInputs:
    """Numbers of a step that are read on the device when it runs; None: not given there.

    Attributes:
        lr: 0-dim fp32 or float64; instead of the config's.
        loss_scale: 0-dim fp32; every gradient is divided by it.
        found_inf: 0-dim fp32; if it is not 0 nothing is changed and no step counted.
    """

    lr: Tensor | None = None
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None


@runtime_checkable
class CapturableBackend(Backend, Protocol):
    """A backend whose step can be captured in a CUDA graph: every replay is one more step."""

    def step_on_device(
        self, tensors: Sequence[TensorStep], config: MicroAdamConfig, inputs: DeviceInputs
    ) -> int | Tensor:
        """As `Backend.step`, but the steps taken before are read from the tensors' ``counter``.

        Args:
            tensors: The tensors, all with the settings ``config``.
            config: betas, eps and weight decay, and lr unless ``inputs`` has it.
            inputs: What else is read on the device.
        """
