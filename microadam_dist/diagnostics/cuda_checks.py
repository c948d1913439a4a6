"""Whether what is installed can compile and run the CUDA kernels, check by check, with the remedy where it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from ..backends.cuda import MIN_CAPABILITY
from ..backends.cuda_installation import CudaInstallation, find_installation, install_command

MIN_CUDA_CORE = (0, 5)


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        name: What was looked at.
        passed: Whether it is as the kernels need it.
        finding: What is there.
        remedy: What to do, empty where it has passed. Never one that installs another torch.
    """

    name: str
    passed: bool
    finding: str
    remedy: str = ""


def check_this_machine() -> list[Check]:
    """The checks of `cuda_checks`, here."""
    return cuda_checks(find_installation())


def cuda_checks(found: CudaInstallation) -> list[Check]:
    """All checks that make sense: without a CUDA build of torch there is none."""
    if found.torch_cuda is None:
        return []
    checks = [_gpus(found), _cuda_core(found), _bindings(found), _nvrtc(found)]
    return checks + [_archs(found)] * (found.nvrtc is not None and bool(found.gpus))


def _gpus(found: CudaInstallation) -> Check:
    names = ", ".join(f"{gpu.name} (compute capability {_dotted(gpu.capability)})" for gpu in found.gpus)
    if not found.gpus:
        remedy = "nvidia-smi has to list one: look at the driver, and at CUDA_VISIBLE_DEVICES"
        return Check("GPU", False, f"torch {found.torch}, CUDA {found.torch_cuda}, sees none", remedy)
    if too_old := [gpu.name for gpu in found.gpus if gpu.capability < MIN_CAPABILITY]:
        wanted = f"the kernels need compute capability {_dotted(MIN_CAPABILITY)} or newer"
        return Check("GPU", False, names, f'{wanted}: on {", ".join(too_old)} use backend="reference"')
    return Check("GPU", True, names)


def _cuda_core(found: CudaInstallation) -> Check:
    command = install_command(found.torch_cuda)
    if found.cuda_core is None:
        return Check("cuda-core", False, f"not installed; torch {found.torch} does not bring it", command)
    if tuple(map(int, found.cuda_core.split(".")[:2])) < MIN_CUDA_CORE:
        return Check("cuda-core", False, f"{found.cuda_core}, too old", command.replace("install", "install --upgrade"))
    return Check("cuda-core", True, found.cuda_core)


def _bindings(found: CudaInstallation) -> Check:
    if found.cuda_bindings is None:
        finding = f"not installed; torch {found.torch} does not bring it"
        return Check("cuda-bindings", False, finding, install_command(found.torch_cuda))
    return Check("cuda-bindings", True, found.cuda_bindings)


def _nvrtc(found: CudaInstallation) -> Check:
    command = install_command(found.torch_cuda)
    if found.nvrtc is None:
        wheel = f"{found.nvrtc_wheel} is installed" if found.nvrtc_wheel else "no wheel of it is installed"
        return Check("NVRTC", False, f"{wheel}, and cannot be used: {found.error}", command)
    finding = f"{_dotted(found.nvrtc)}, {found.nvrtc_path or found.nvrtc_wheel}"
    newest = found.driver_cuda or _major(found.torch_cuda)  # a driver that torch runs on has at least torch's
    if found.nvrtc[0] > newest:
        what = "the driver runs" if found.driver_cuda else "torch was built for"
        return Check("NVRTC", False, f"{finding}; {what} CUDA {newest}", install_command(str(newest)))
    return Check("NVRTC", True, finding)


def _archs(found: CudaInstallation) -> Check:
    """Whether each GPU is one that NVRTC compiles for."""
    known = " ".join(f"sm_{arch}" for arch in found.archs)
    unknown = sorted({10 * major + minor for gpu in found.gpus for major, minor in [gpu.capability]} - {*found.archs})
    if unknown and found.nvrtc:
        missing = " and ".join(f"sm_{arch}" for arch in unknown)
        newer = f"an NVRTC newer than {_dotted(found.nvrtc)}, as a torch for a newer CUDA brings it, compiles for it"
        return Check(
            "architectures", False, f"{missing} is not among {known}", f'{newer}; until then backend="reference"'
        )
    return Check("architectures", True, known)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _major(version: str | None) -> int:
    return int((version or "0").partition(".")[0])
