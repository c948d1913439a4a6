"""The choice of a backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError, ConfigError
from .base import Backend, TensorStep
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend

_BACKENDS: dict[str, Callable[[], Backend]] = {"reference": ReferenceBackend, "cpu": CpuBackend, "cuda": CudaBackend}
BACKEND_NAMES = ("auto", *_BACKENDS)
SLOWER = "50 to 300 times slower"  # the reference backend than the compiled kernel: by microadam bench step, two cores
LARGE_NUMEL = 10_000_000  # the reference backend takes seconds for so many elements


def select_backend(name: str) -> Backend:
    """The backend of that name; ``auto`` takes for every tensor the fastest that can run, the others never fall back.

    Raises:
        ConfigError: There is no backend of that name.
        BackendUnavailableError: A backend asked for by name cannot run here; says why and what to do.
    """
    if name == "auto":
        return AutoBackend()
    if name not in BACKEND_NAMES:
        raise ConfigError(f"backend={name!r}: expected one of {', '.join(BACKEND_NAMES)}.")
    return _BACKENDS[name]()


class AutoBackend:
    """Chooses by the device of each tensor; the parameters of a group may lie on several devices.

    The fused backend of a type of device is looked for when the first parameter on such a device is seen.

    Attributes:
        unavailable: Name of each fused backend that was looked for and cannot run here -> why, and what to do.
    """

    name = "auto"
    _fused = ("cpu", "cuda")  # types of devices with a backend of that name; the reference backend runs the rest

    def __init__(self) -> None:
        self._backends = {"reference": select_backend("reference")}
        self.unavailable: dict[str, str] = {}
        self._has_warned = False

    def __reduce__(self) -> tuple[type[AutoBackend], tuple[()]]:
        return AutoBackend, ()  # where it is unpickled other backends may be available

    def choose(self, device: torch.device) -> Backend:
        """The fastest backend on this device."""
        name = device.type
        if name in self._fused and name not in self.unavailable:
            try:
                if name not in self._backends:
                    self._backends[name] = select_backend(name)
                self._backends[name].check(device)
                return self._backends[name]
            except BackendUnavailableError as error:
                self.unavailable[name] = str(error)
                if name == "cuda":
                    warnings.warn(f"MicroAdam takes its slow reference backend on {device}. {error}", stacklevel=2)
        return self._backends["reference"]

    def check(self, device: torch.device) -> None:
        """The reference backend runs on every device."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int | Tensor:
        """See `Backend.step`."""
        devices = {tensor.param.device for tensor in tensors}
        if len(devices) == 1:
            return self._step_on(devices.pop(), tensors, config, grad_scale)
        by_device: dict[torch.device, list[TensorStep]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.param.device, []).append(tensor)
        num_skipped: int | Tensor = 0
        for device, members in by_device.items():
            # A sum lies where its last part does.
            so_far = num_skipped.to(device) if isinstance(num_skipped, Tensor) else num_skipped
            num_skipped = so_far + self._step_on(device, members, config, grad_scale)
        return num_skipped

    def _step_on(
        self, device: torch.device, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float
    ) -> int | Tensor:
        backend = self.choose(device)
        if device.type == "cpu" and "cpu" in self.unavailable and not self._has_warned:
            if sum(tensor.param.numel() for tensor in tensors) >= LARGE_NUMEL:
                self._has_warned = True
                warnings.warn(
                    f"MicroAdam steps on the CPU are {SLOWER} without the compiled kernel. {self.unavailable['cpu']}",
                    stacklevel=2,
                )
        return backend.step(tensors, config, grad_scale)
