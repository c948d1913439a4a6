"""The narrow interface of a backend, and the choice of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError, ConfigError
from ..layout import StateLayout


@dataclass(frozen=True, slots=True)
class TensorStep:
    """What a backend needs to update one local tensor.

    Attributes:
        param: (numel,) fp32, bf16 or fp16, contiguous; updated in place.
        grad: (numel,) any float dtype, contiguous; only read. None: only the weights are updated, from a window whose
            newest slot has been put there, and ``state`` needs no more than that window; not for the dense path.
        state: The state tensors named in ``layout.tensors``, contiguous, of any shape; updated in place. It may hold
            others.
        layout: Where the blocks lie in all of these.
        step: Steps this tensor has taken before.
        param_copy: (numel,) bf16, contiguous, or None. A second output: wherever the layout has spans it holds the
            parameter after the step, rounded.
    """

    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    layout: StateLayout
    step: int
    param_copy: Tensor | None = None


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


BACKEND_NAMES = ("auto", "reference", "cpu")


def select_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes for every tensor the fastest that can run, the others never fall back.

    Raises:
        ConfigError: There is no backend of that name.
        BackendUnavailableError: A backend asked for by name cannot run here; says why and what to do.
    """
    if name == "auto":
        return AutoBackend()
    if name == "reference":
        from .reference import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend()
    raise ConfigError(f"backend={name!r}: expected one of {', '.join(BACKEND_NAMES)}.")


class AutoBackend:
    """Chooses by the settings and the device of each tensor; the parameters of a group may lie on several devices.

    Attributes:
        unavailable: Name of each faster backend that cannot run here -> why, and what to do.
    """

    name = "auto"
    _preferred = ("cpu",)  # fastest first; the reference backend runs what none of them can

    def __init__(self) -> None:
        self._backends = {"reference": select_backend("reference")}
        self.unavailable: dict[str, str] = {}
        for name in self._preferred:
            try:
                self._backends[name] = select_backend(name)
            except BackendUnavailableError as error:
                self.unavailable[name] = str(error)

    def __reduce__(self) -> tuple[type[AutoBackend], tuple[()]]:
        return AutoBackend, ()  # where it is unpickled other backends may be available

    def choose(self, config: MicroAdamConfig, device: torch.device) -> Backend:
        """The fastest backend for these settings on this device."""
        for name in self._preferred:
            backend = self._backends.get(name)
            if backend is not None and _can_run(backend, config, device):
                return backend
        return self._backends["reference"]

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
        """Every valid setting runs on every device."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        """See `Backend.step`."""
        by_device: dict[torch.device, list[TensorStep]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.param.device, []).append(tensor)
        return sum(
            self.choose(config, device).step(members, config, grad_scale) for device, members in by_device.items()
        )


def _can_run(backend: Backend, config: MicroAdamConfig, device: torch.device) -> bool:
    try:
        backend.check(config, device)
    except (ConfigError, BackendUnavailableError):
        return False
    return True
