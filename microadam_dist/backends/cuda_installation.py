"""What the CUDA kernels need, and what of it is installed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # CUDA 13 and newer, CUDA 12


@dataclass(frozen=True)
class Gpu:
    """A visible device."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class CudaInstallation:
    """Versions as their packages give them; None for what is not there.

    Attributes:
        torch: Of torch.
        torch_cuda: CUDA version that torch was built for, such as ``"12.8"``.
        gpus: Devices that torch sees.
        driver_cuda: Newest major CUDA version that the driver runs; None where it cannot be asked.
        cuda_core: Of cuda-core.
        cuda_bindings: Of cuda-bindings.
        nvrtc_wheel: Name and version of NVRTC's wheel; there is none where it came in another way.
        nvrtc: Version of the library that was loaded.
        nvrtc_path: Where it lies.
        archs: What it compiles for: 90 is sm_90.
        error: Why cuda-core or NVRTC cannot be used.
    """

    torch: str
    torch_cuda: str | None
    gpus: tuple[Gpu, ...] = ()
    driver_cuda: int | None = None
    cuda_core: str | None = None
    cuda_bindings: str | None = None
    nvrtc_wheel: str | None = None
    nvrtc: tuple[int, int] | None = None
    nvrtc_path: str | None = None
    archs: tuple[int, ...] = ()
    error: str | None = None


def install_command(torch_cuda: str | None) -> str:
    """What brings everything the kernels need beside torch, and leaves torch and its own libraries as they are."""
    return f"pip install 'cuda-core[cu{(torch_cuda or '13').partition('.')[0]}]'"


def find_installation() -> CudaInstallation:
    """Look at this machine."""
    wheels = ((name, _version(name)) for name in _NVRTC_WHEELS)
    loaded: dict[str, Any] = {}
    error = None
    try:
        loaded = _load_nvrtc()
    except (ImportError, RuntimeError, OSError) as reason:
        error = " ".join(str(reason).split())
    return CudaInstallation(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpus=tuple(
            Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
            for index in range(torch.cuda.device_count())
        ),
        cuda_core=_version("cuda-core"),
        cuda_bindings=_version("cuda-bindings"),
        nvrtc_wheel=next((f"{name} {number}" for name, number in wheels if number), None),
        error=error,
        **loaded,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _load_nvrtc() -> dict[str, Any]:
    """What only the loaded libraries tell; as `nvrtc.nvrtc_version`, which the kernels are compiled by.

    Raises:
        ImportError, RuntimeError, OSError: They cannot be loaded.
    """
    import cuda.core
    from cuda.bindings import driver, nvrtc

    if not hasattr(cuda.core, "Program"):
        raise ImportError(f"cuda-core {cuda.core.__version__} is too old")
    _, *number = nvrtc.nvrtcVersion()
    found: dict[str, Any] = {"nvrtc": tuple(number), "archs": tuple(nvrtc.nvrtcGetSupportedArchs()[1])}
    with contextlib.suppress(ImportError):  # bindings before 12.9 have no pathfinder
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found["nvrtc_path"] = load_nvidia_dynamic_lib("nvrtc").abs_path
    with contextlib.suppress(RuntimeError):  # no driver
        status, newest = driver.cuDriverGetVersion()
        found["driver_cuda"] = None if int(status) else newest // 1000
    return found
