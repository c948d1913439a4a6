"""The Python of the CUDA backend without a GPU: the harness runs what is launched."""

from __future__ import annotations

import copy
import ctypes
import math
from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from microadam_dist import MicroAdam
from microadam_dist.backends import cuda, cuda_launch
from microadam_dist.backends.cuda import CudaBackend
from microadam_dist.backends.cuda_launch import Launch
from microadam_dist.backends.reference import ReferenceBackend
from microadam_dist.config import MicroAdamConfig

from .cases import KERNEL_CASES
from .checks import assert_same_bits, assert_same_for_many_tensors, same_bits
from .cuda_harness import COMPILER, SOURCES, build_step

if COMPILER is None:
    pytest.skip("no C++ compiler for the harness", allow_module_level=True)

CPU = torch.device("cpu")
_BY_NAME = {case.name: case for case in KERNEL_CASES}


class _Driver:
    """A module is its macros, a kernel its name with them, a stream nothing."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    num_launches = 0

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, 13000

    def cuModuleLoadData(self, macros: dict[str, str | int]) -> tuple[int, Any]:
        return 0, macros

    def cuModuleGetFunction(self, macros: dict[str, str | int], name: bytes) -> tuple[int, Any]:
        return 0, (macros, name)

    def cuLaunchKernel(self, kernel: Any, num_blocks: int, *shape_and_stream: int) -> tuple[int]:
        (macros, name), parameters = kernel, shape_and_stream[-2]
        launch = Launch.from_address(ctypes.c_void_p.from_address(parameters).value or 0)
        assert name == b"microadam_step"
        assert build_step(SOURCES, macros).harness_step(ctypes.byref(launch), num_blocks, False)
        self.num_launches += 1
        return (0,)


class _HostBackend(CudaBackend):
    def check(self, device: torch.device) -> None:
        """Tensors in host memory are welcome."""


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    bindings = pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(bindings, "driver", _Driver(), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(cuda.nvrtc, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cuda.nvrtc, "compile_kernel", lambda macros, architecture: macros)
    return _HostBackend()


def _optimizer(backend: CudaBackend, shapes: Iterable[tuple[int, ...]]) -> MicroAdam:
    generator = torch.Generator().manual_seed(0)
    optimizer = MicroAdam([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes], window_size=2)
    optimizer._backend = backend
    return optimizer


def _step(optimizer: MicroAdam, seed: int, in_backward: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.param_groups[0]["params"]:
        # Those of an odd seed begin where no vector can be read.
        p.grad = torch.randn(p.numel() + seed % 2, generator=generator)[seed % 2 :].view(p.shape)
        p.grad.flatten()[seed] = math.nan
        if in_backward:
            optimizer.step_in_backward(p, 0)
    if not in_backward:
        optimizer.step()


@pytest.mark.parametrize("name", ["normal", "nonfinite", "bfloat16-bfloat16", "flat-shard", "normal-packed"])
def test_bit_identical_to_the_reference(name: str, backend: CudaBackend) -> None:
    assert_same_bits(_BY_NAME[name], backend)


def test_one_call_for_many_tensors(backend: CudaBackend) -> None:
    assert_same_for_many_tensors(backend)


SHAPES = [(64, 300), (300,), (64, 300), (70, 64)]


@pytest.mark.filterwarnings("ignore:MicroAdam skipped:UserWarning")
@pytest.mark.parametrize("in_backward", [False, True])
def test_steps_of_an_optimizer(in_backward: bool, backend: CudaBackend) -> None:
    """What changes between steps is noticed; skipped blocks are counted, as many as in another backend."""
    optimizers = [_optimizer(backend, SHAPES), _optimizer(backend, SHAPES)]
    optimizers[1]._backend = ReferenceBackend()  # type: ignore[assignment]
    for seed in range(5):
        for optimizer in optimizers:
            if seed == 3:
                optimizer.param_groups[0].update(lr=0.1, weight_decay=0.5, rounding="nearest")
                for p in optimizer.param_groups[0]["params"]:
                    p.data = p.data.t().contiguous().t() if p.ndim == 2 else p.data.clone()
                    for tensor in optimizer.state[p].values():  # the same tensors in other memory
                        tensor.data = tensor.data.clone()
            _step(optimizer, seed, in_backward)
        for p, twin in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
            assert same_bits(p.detach().flatten(), twin.detach().flatten()), seed
            for name, tensor in optimizers[1].state[twin].items():
                assert same_bits(optimizers[0].state[p][name].flatten(), tensor.flatten()), (seed, name)
    assert optimizers[0].num_nonfinite_blocks == optimizers[1].num_nonfinite_blocks > 0
    assert copy.deepcopy(optimizers[0]._nonfinite).total == optimizers[1].num_nonfinite_blocks


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_launch_is_all_that_a_step_makes(
    in_backward: bool, backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = _optimizer(backend, SHAPES)
    built: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            built[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    names = {"kernel_macros", "window_weights", "launch_tables", "address_rows", "FilledLaunch"}
    for name in names:
        count(cuda, name)
    _step(optimizer, 0, in_backward)
    assert built.keys() == names
    built.clear()
    num_launches, num_scalars = backend._driver.num_launches, cuda_launch.host_scalars.cache_info().misses
    _step(optimizer, 2, in_backward)
    assert not built
    assert cuda_launch.host_scalars.cache_info().misses <= num_scalars + 1
    assert backend._driver.num_launches - num_launches == (
        len(SHAPES) if in_backward else 2
    )  # rows of 300, and aligned ones of 64


def test_factors_are_those_of_the_settings(backend: CudaBackend) -> None:
    """What is kept for one group of parameters is not given to another."""
    configs = [
        MicroAdamConfig(correction=correction, window_size=window_size, betas=betas)
        for correction in ("window", "steps")
        for window_size in (1, 4)
        for betas in ((0.9, 0.999), (0.5, 0.9))
    ]
    for config in 2 * configs:
        assert torch.equal(backend._factors(config, CPU), cuda_launch.step_factors(config, CPU)), config
        assert torch.equal(backend._weights(config, CPU), cuda_launch.window_weights(config, CPU)), config
