"""The narrow interface of a backend, and the choice of one."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from ..errors import BackendUnavailableError, ConfigError
from ..layout import StateLayout

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
        """Raise if the backend cannot run these settings on this device.

        Raises:
            ConfigError: A setting the backend does not have.
            BackendUnavailableError: Not on this device.
        """

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


def readable_grads(tensors: Iterable[TensorStep]) -> list[Tensor | None]:
    """The gradients in a dtype that the fused kernels read."""
    grads = [tensor.grad for tensor in tensors]
    return [grad if grad is None or grad.dtype in _KERNEL_DTYPES else grad.float() for grad in grads]


STATE_NAMES = ("codes", "bucket_lo", "bucket_hi", "indices", "values", "scales", "exp_avg", "exp_avg_sq")


class Addresses(NamedTuple):
    """Addresses of tensors, a list for each field with one entry a `TensorStep`; 0 for what it does not have.

    Field by field, because a Python call a tensor takes longer than the step of a small one.

    Attributes:
        param, grad, counter: As in `TensorStep`; ``grad`` as it was given.
        state: One list for each of `STATE_NAMES`.
    """

    param: list[int]
    grad: list[int]
    counter: list[int]
    state: list[list[int]]

    @classmethod
    def of(cls, tensors: Sequence[TensorStep], grads: Sequence[Tensor | None]) -> Addresses:
        """Of tensors and their gradients."""
        states = [tensor.state for tensor in tensors]
        return cls(
            param=[tensor.param.data_ptr() for tensor in tensors],
            grad=_optional(grads),
            counter=_optional([tensor.counter for tensor in tensors]),
            state=[[state[name].data_ptr() if name in state else 0 for state in states] for name in STATE_NAMES],
        )


def _optional(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def pack_rows(fields: Sequence[Sequence[int]]) -> bytes:
    """A table of 64-bit integers, row by row, from its fields."""
    return struct.pack(f"{sum(map(len, fields))}q", *chain.from_iterable(zip(*fields, strict=True)))


def count_steps(tensors: Iterable[TensorStep]) -> None:
    """Add 1 to the counters of tensors that have been stepped."""
    counters = [tensor.counter for tensor in tensors if tensor.counter is not None]
    if counters:
        torch._foreach_add_(counters, 1)


BACKEND_NAMES = ("auto", "reference", "cpu", "cuda")


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
    if name == "cuda":
        from .cuda import CudaBackend

        return CudaBackend()
    raise ConfigError(f"backend={name!r}: expected one of {', '.join(BACKEND_NAMES)}.")


class AutoBackend:
    """Chooses by the settings and the device of each tensor; the parameters of a group may lie on several devices.

    The fused backend of a type of device is looked for when the first parameter on such a device is seen.

    Attributes:
        unavailable: Name of each fused backend that was looked for and cannot run here -> why, and what to do.
    """

    name = "auto"
    _fused = ("cpu", "cuda")  # types of devices with a backend of that name; the reference backend runs the rest

    def __init__(self) -> None:
        self._backends = {"reference": select_backend("reference")}
        self.unavailable: dict[str, str] = {}

    def __reduce__(self) -> tuple[type[AutoBackend], tuple[()]]:
        return AutoBackend, ()  # where it is unpickled other backends may be available

    def choose(self, config: MicroAdamConfig, device: torch.device) -> Backend:
        """The fastest backend for these settings on this device."""
        name = device.type
        if name in self._fused and name not in self.unavailable:
            try:
                if name not in self._backends:
                    self._backends[name] = select_backend(name)
                self._backends[name].check(config, device)
                return self._backends[name]
            except BackendUnavailableError as error:
                self.unavailable[name] = str(error)
                if name == "cuda":
                    warnings.warn(f"MicroAdam takes its slow reference backend on {device}. {error}", stacklevel=2)
            except ConfigError:
                pass  # settings for studies, which only the reference backend has
        return self._backends["reference"]

    def check(self, config: MicroAdamConfig, device: torch.device) -> None:
        """Every valid setting runs on every device."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int | Tensor:
        """See `Backend.step`."""
        by_device: dict[torch.device, list[TensorStep]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.param.device, []).append(tensor)
        num_skipped: int | Tensor = 0
        for device, members in by_device.items():
            # A sum lies where its last part does.
            so_far = num_skipped.to(device) if isinstance(num_skipped, Tensor) else num_skipped
            num_skipped = so_far + self.choose(config, device).step(members, config, grad_scale)
        return num_skipped
