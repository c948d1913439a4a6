"""The environment report: versions, and which backend would take a step here, and why not the others."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..backends.cpu import CpuBackend
from ..backends.cuda import CudaBackend
from ..backends.select import SLOWER, AutoBackend
from ..errors import BackendUnavailableError

_PACKAGES = ("microadam-dist", "torch", "cuda-core", "cuda-bindings", "deepspeed", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """Name -> version of Python, of the CUDA of torch and of the packages that matter, if only "not installed"."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def backends() -> dict[str, str]:
    """Name -> what the backend has here, or why it cannot be used."""
    found = {"reference": "available: pure PyTorch, any device"}
    try:
        cpu = CpuBackend()
        found["cpu"] = f"available: {cpu.isa}, {cpu.num_threads} threads ({cpu.threading})"
    except BackendUnavailableError as error:
        found["cpu"] = f"not available, steps on the CPU are {SLOWER}: {error}"
    try:
        found["cuda"] = f"available: {CudaBackend().describe()}"
    except BackendUnavailableError as error:
        found["cuda"] = f"not available: {error}"
    return found


def chosen() -> dict[str, str]:
    """Device -> the backend that ``backend="auto"`` takes there, with the default settings."""
    auto = AutoBackend()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: auto.choose(torch.device(device)).name for device in devices}
