"""What doctor says of CUDA: for what torch 2.6 to 2.14 bring, and for what can be missing. No GPU is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from microadam_dist.backends.cuda_installation import CudaInstallation, Gpu, find_installation
from microadam_dist.diagnostics.cuda_checks import Check, check_this_machine, cuda_checks

H100 = Gpu("H100", (9, 0))
ARCHS_12_4 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)  # as the libraries list them
ARCHS_12_8 = (*ARCHS_12_4, 100, 101, 120)
ARCHS_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
ARCHS = {(12, 4): ARCHS_12_4, (12, 6): ARCHS_12_4, (12, 8): ARCHS_12_8, (13, 0): ARCHS_13_0}

# torch -> CUDA, NVRTC, cuda-bindings that its wheel on PyPI (Linux, x86-64) requires; none requires cuda-core.
BROUGHT = {
    "2.6.0": ("12.4", "nvidia-cuda-nvrtc-cu12 12.4.127", None),
    "2.7.1": ("12.6", "nvidia-cuda-nvrtc-cu12 12.6.77", None),
    "2.8.0": ("12.8", "nvidia-cuda-nvrtc-cu12 12.8.93", None),
    "2.9.1": ("12.8", "nvidia-cuda-nvrtc-cu12 12.8.93", None),
    "2.10.0": ("12.8", "nvidia-cuda-nvrtc-cu12 12.8.93", "12.9.4"),
    "2.11.0": ("13.0", "nvidia-cuda-nvrtc 13.0.88", "13.0.3"),
    "2.12.1": ("13.0", "nvidia-cuda-nvrtc 13.0.88", "13.0.3"),
    "2.13.0": ("13.0", "nvidia-cuda-nvrtc 13.0.88", "13.0.3"),
    "2.14.1": ("13.0", "nvidia-cuda-nvrtc 13.0.88", "13.0.3"),
}


def alone(torch: str) -> CudaInstallation:
    """torch as pip installs it, on an H100 whose driver is as old as torch allows."""
    cuda, wheel, bindings = BROUGHT[torch]
    return CudaInstallation(
        torch=torch,
        torch_cuda=cuda,
        gpus=(H100,),
        cuda_bindings=bindings,
        nvrtc_wheel=wheel,
        error="No module named 'cuda.core'" if bindings else "No module named 'cuda'",
    )


def complete(torch: str) -> CudaInstallation:
    """After the remedy: what torch has brought is kept."""
    found = alone(torch)
    major, minor = map(int, found.torch_cuda.split("."))
    return replace(
        found,
        driver_cuda=major,
        cuda_core="1.2.2",
        cuda_bindings=found.cuda_bindings or "12.9.10",
        nvrtc=(major, minor),
        nvrtc_path=f"/site-packages/nvidia/libnvrtc.so.{major}",
        archs=ARCHS[major, minor],
        error=None,
    )


def failed(found: CudaInstallation) -> dict[str, Check]:
    checks = cuda_checks(found)
    assert all(bool(check.remedy) != check.passed and check.finding for check in checks)
    # torch itself and this package, which need not be on the machine's index, are never part of a remedy.
    commands = [check.remedy for check in checks if "pip" in check.remedy]
    assert all("torch" not in command and "microadam" not in command for command in commands)
    return {check.name: check for check in checks if not check.passed}


@pytest.mark.parametrize("torch", BROUGHT)
def test_what_torch_alone_lacks(torch: str) -> None:
    found = failed(alone(torch))
    missing = {"cuda-core", "NVRTC"} | ({"cuda-bindings"} if BROUGHT[torch][2] is None else set())
    assert found.keys() == missing
    major = BROUGHT[torch][0].partition(".")[0]
    assert {check.remedy for check in found.values()} == {f"pip install 'cuda-core[cu{major}]'"}
    assert BROUGHT[torch][1] in found["NVRTC"].finding and "No module named" in found["NVRTC"].finding


@pytest.mark.parametrize("torch", BROUGHT)
def test_nothing_is_missing_after_the_remedy(torch: str) -> None:
    assert not failed(complete(torch))
    assert [check.name for check in cuda_checks(complete(torch))] == [
        *("GPU", "cuda-core", "cuda-bindings", "NVRTC", "architectures")
    ]


@pytest.mark.parametrize("torch", BROUGHT)
@pytest.mark.parametrize(("gpu", "arch"), [(Gpu("B200", (10, 0)), 100), (Gpu("RTX 5090", (12, 0)), 120)], ids=str)
def test_a_gpu_newer_than_nvrtc(gpu: Gpu, arch: int, torch: str) -> None:
    found = replace(complete(torch), gpus=(H100, gpu))
    if arch in found.archs:
        assert not failed(found)
        return
    (check,) = failed(found).values()
    assert check.name == "architectures" and check.finding.startswith(f"sm_{arch} is not among sm_50")
    assert f"newer than {BROUGHT[torch][0]}" in check.remedy and 'backend="reference"' in check.remedy


@pytest.mark.parametrize("torch", [torch for torch in BROUGHT if BROUGHT[torch][0] < "13"])
def test_nvrtc_of_a_newer_cuda_than_the_driver(torch: str) -> None:
    """`pip install cuda-bindings` beside a torch for CUDA 12 brings those of CUDA 13."""
    newer = replace(complete(torch), cuda_bindings="13.5.0", nvrtc=(13, 0), archs=ARCHS_13_0)
    (check,) = failed(newer).values()
    assert check.name == "NVRTC" and "the driver runs CUDA 12" in check.finding
    assert check.remedy == "pip install 'cuda-core[cu12]'"
    (check,) = failed(replace(newer, driver_cuda=None)).values()
    assert "torch was built for CUDA 12" in check.finding
    assert not failed(replace(newer, driver_cuda=13))


def test_other_obstacles() -> None:
    found = complete("2.13.0")
    assert failed(replace(found, gpus=()))["GPU"].remedy.startswith("nvidia-smi has to list one")
    old = failed(replace(found, gpus=(H100, Gpu("T4", (7, 5)))))
    assert old.keys() == {"GPU"} and 'on T4 use backend="reference"' in old["GPU"].remedy
    core = failed(replace(found, cuda_core="0.4.2"))["cuda-core"]
    assert core.remedy == "pip install --upgrade 'cuda-core[cu13]'"
    gone = replace(found, nvrtc=None, nvrtc_path=None, nvrtc_wheel=None, archs=(), error="libnvrtc.so.13 not found")
    assert failed(gone)["NVRTC"].finding == "no wheel of it is installed, and cannot be used: libnvrtc.so.13 not found"
    assert cuda_checks(replace(found, torch="2.13.0+cpu", torch_cuda=None)) == []


def test_this_machine() -> None:
    found = find_installation()
    if found.error is None:
        assert found.nvrtc and 90 in found.archs and found.cuda_core and found.cuda_bindings
    assert bool(check_this_machine()) == (found.torch_cuda is not None)
    assert failed(found).keys() >= (set() if found.gpus or not found.torch_cuda else {"GPU"})
