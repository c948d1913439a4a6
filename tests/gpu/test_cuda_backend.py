"""The CUDA backend on a GPU against the reference backend on the CPU: every bit, after each step."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microadam_dist import MicroAdam
from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.cuda import CudaBackend
from microadam_dist.backends.select import AutoBackend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError
from microadam_dist.layout import ShardSpan, StateLayout

from ..kernels.cases import BF16, FP16, KERNEL_CASES, Case
from ..kernels.checks import (
    assert_same_bits,
    assert_same_every_16_bit_weight,
    assert_same_for_many_tensors,
    same_bits,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend() -> CudaBackend:
    return CudaBackend()


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_bit_identical_to_the_reference(case: Case, backend: CudaBackend) -> None:
    assert_same_bits(case, backend, "cuda")
    assert_same_bits(replace(case, padding=16), backend, "cuda")  # the spans begin where vectors can be read


@pytest.mark.parametrize(("dtype", "rounding"), [(BF16, "nearest"), (BF16, "stochastic"), (FP16, "auto")], ids=str)
@pytest.mark.parametrize(("shape", "decay"), [((2**16,), 0.21), ((64, 2**10), 0.0), ((64, 2**10), 0.21)], ids=str)
def test_every_16_bit_weight(
    shape: tuple[int, ...], dtype: torch.dtype, rounding: str, decay: float, backend: CudaBackend
) -> None:
    assert_same_every_16_bit_weight(backend, shape, dtype, decay, "cuda", rounding)


def test_one_call_for_many_tensors(backend: CudaBackend) -> None:
    assert_same_for_many_tensors(backend, "cuda")


def test_more_tensors_than_a_launch_holds(backend: CudaBackend) -> None:
    config = MicroAdamConfig(block_size=64)
    layout = StateLayout((ShardSpan("w", (64, 64), 0, 4096),), config)
    param, grad = torch.randn(4096), torch.randn(4096)
    tensors = [
        TensorStep(param.cuda(), grad.cuda(), allocate_state(layout, torch.device("cuda")), layout, 0)
        for _ in range(600)
    ]
    backend.step(tensors, config, 1.0)
    assert not torch.equal(tensors[0].param.cpu(), param)
    assert all(torch.equal(tensor.param, tensors[0].param) for tensor in tensors)


def test_more_than_2_31_elements(backend: CudaBackend) -> None:
    """Rows beyond element 2**31 are updated like the same rows in a small tensor."""
    rows, cols = 2**19 + 64, 4096
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    config = MicroAdamConfig(window_size=2, density=0.05, weight_decay=0.1, lr=1e-2)
    generator = torch.Generator(device="cuda").manual_seed(0)
    param = torch.randn(rows * cols, generator=generator, device="cuda", dtype=BF16)
    grad = torch.randn(rows * cols, generator=generator, device="cuda", dtype=BF16)
    last = slice((rows - 64) * cols, None)
    small_param, small_grad = param[last].clone(), grad[last].clone()
    results = []
    for p, g, n in ((param, grad, rows), (small_param, small_grad, 64)):
        layout = StateLayout((ShardSpan("w", (n, cols), 0, n * cols),), config)
        state = allocate_state(layout, p.device)
        for step in range(3):
            backend.step([TensorStep(p, g, state, layout, step)], config, 1.0)
        results.append((p, state))
    (large, large_state), (small, small_state) = results
    assert torch.equal(large[last], small)
    for name, tensor in small_state.items():
        assert torch.equal(large_state[name][-tensor.numel() :], tensor), name


# ---------------------------------------------------------------- streams, graphs, waiting


@pytest.fixture
def sync_debug_mode() -> Iterator[None]:
    """Ends the mode in which torch raises where the host would wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def _small_step(step: int = 0) -> tuple[TensorStep, MicroAdamConfig]:
    config = MicroAdamConfig(block_size=256, window_size=3)
    layout = StateLayout((ShardSpan("w", (40, 300), 0, 12000),), config)
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(12000, generator=generator), torch.randn(12000, generator=generator)
    return TensorStep(param.cuda(), grad.cuda(), allocate_state(layout, torch.device("cuda")), layout, step), config


def test_a_step_does_not_wait(backend: CudaBackend, sync_debug_mode: None) -> None:
    tensor, config = _small_step()
    backend.step([tensor], config, 1.0)  # compiles and fills tables
    torch.cuda.set_sync_debug_mode("error")
    skipped = backend.step([tensor._replace(step=1)], config, 1.0)
    assert isinstance(skipped, Tensor)


def test_the_optimizer_does_not_wait(sync_debug_mode: None) -> None:
    param = nn.Parameter(torch.randn(64, 300, device="cuda"))
    optimizer = MicroAdam([param], block_size=256)
    for step in range(4):
        param.grad = torch.randn_like(param)
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()


def test_side_stream(backend: CudaBackend) -> None:
    """The kernel runs in the stream that is current, after what was put there before."""
    expected, config = _small_step()
    backend.step([expected], config, 1.0)
    tensor, _ = _small_step()
    late_grad = torch.zeros_like(tensor.grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_grad.copy_(tensor.grad)
        backend.step([tensor._replace(grad=late_grad)], config, 1.0)
    stream.synchronize()
    assert torch.equal(tensor.param, expected.param)
    assert all(torch.equal(tensor.state[name], x) for name, x in expected.state.items())


def test_captured_steps() -> None:
    """Replays of a CUDA graph count steps and read the learning rate anew; same bits as the reference."""
    shapes = (64, 300), (300,), (70, 64)
    settings = {"weight_decay": 0.1, "window_size": 3, "block_size": 256, "density": 0.05}
    generator = torch.Generator().manual_seed(0)
    twins = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    params = [nn.Parameter(twin.detach().cuda()) for twin in twins]
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = MicroAdam(params, lr=lr, capturable=True, **settings)
    reference = MicroAdam(twins, lr=float(lr), backend="reference", **settings)
    for param in params:
        param.grad = torch.empty_like(param)

    def new_gradients() -> None:
        for param, twin in zip(params, twins, strict=True):
            twin.grad = torch.randn(twin.shape, generator=generator)
            param.grad.copy_(twin.grad)

    stream = torch.cuda.Stream()
    for _ in range(2):
        new_gradients()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for replay in range(6):
        new_gradients()
        lr.fill_(1e-2 / (replay + 2))
        reference.param_groups[0]["lr"] = float(lr)
        graph.replay()
        reference.step()
        for param, twin in zip(params, twins, strict=True):
            assert same_bits(param.detach().cpu(), twin.detach())
            state = optimizer.state[param]
            assert int(state["step"]) == int(reference.state[twin]["step"])
            for name, tensor in reference.state[twin].items():
                assert name == "step" or same_bits(state[name].cpu(), tensor), name


def test_capture_before_the_first_step_is_refused() -> None:
    param = nn.Parameter(torch.randn(64, 300, device="cuda"))
    param.grad = torch.randn_like(param)
    optimizer = MicroAdam([param], capturable=True)
    layout = optimizer.sharded.layouts()[param]
    optimizer.sharded.load_shards({param: {"step": torch.tensor(1), **allocate_state(layout, param.device)}})
    with (
        pytest.raises(BackendUnavailableError, match="at least one step before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_overflow_is_skipped_on_the_device(sync_debug_mode: None) -> None:
    """With GradScaler and capturable nothing waits; an overflow neither changes a weight nor counts as a step."""
    param = nn.Parameter(torch.randn(64, 300, device="cuda"))
    optimizer = MicroAdam([param], block_size=256, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for step, factor in enumerate((1.0, 1.0, math.inf, 1.0)):
        optimizer.zero_grad()
        scaler.scale((param * torch.randn_like(param) * factor).sum()).backward()
        before = param.detach().clone()
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
        scaler.step(optimizer)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        assert torch.equal(before, param) == math.isinf(factor)
    assert int(optimizer.state[param]["step"]) == 3
    assert optimizer.num_nonfinite_blocks == 0


# ---------------------------------------------------------------- around the kernel


def test_skipped_blocks_are_counted_and_warned_of() -> None:
    param = nn.Parameter(torch.randn(64, 300, device="cuda"))
    optimizer = MicroAdam([param], block_size=256)
    with pytest.warns(UserWarning, match="skipped .* blocks") as record:
        for step in range(4):
            param.grad = torch.randn_like(param)
            if step in (1, 2):
                param.grad[step, step] = math.nan
            optimizer.step()
            torch.cuda.synchronize()
    assert len([warning for warning in record if "skipped" in str(warning.message)]) == 1
    assert optimizer.num_nonfinite_blocks == 2
    assert copy.deepcopy(optimizer).num_nonfinite_blocks == 2


def test_capturable_state_can_be_saved() -> None:
    params = [nn.Parameter(torch.randn(64, 300, device="cuda")) for _ in range(2)]
    optimizers = [MicroAdam([param], block_size=256, capturable=True) for param in params]
    params[0].grad = torch.randn_like(params[0])
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    step = optimizers[1].state[params[1]]["step"]
    assert step.is_cuda and int(step) == 1


def test_devices_it_does_not_have(backend: CudaBackend) -> None:
    backend.check(torch.device("cuda"))
    with pytest.raises(BackendUnavailableError, match="cannot update a parameter on cpu"):
        backend.check(torch.device("cpu"))
    assert AutoBackend().choose(torch.device("cuda", 0)).name == "cuda"
    assert pickle.loads(pickle.dumps(backend)).name == "cuda"
    assert "compute capability" in backend.describe()


# ---------------------------------------------------------------- sanitizers

SANITIZED = """
from dataclasses import replace
from microadam_dist.backends.cuda import CudaBackend
from tests.kernels.cases import KERNEL_CASES
from tests.kernels.checks import assert_same_bits
cases = {case.name: case for case in KERNEL_CASES}
backend = CudaBackend()
for name in "normal ties nonfinite row-1001 flat-shard paper-default 4096-10%-1 bucket-6 15000".split():
    for padding in (7, 16):
        assert_same_bits(replace(cases[name], padding=padding, num_steps=3), backend, "cuda")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=microadam"]
    run = subprocess.run([*command, sys.executable, "-c", SANITIZED], cwd=ROOT, capture_output=True, text=True)
    if "Device not supported" in run.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert run.returncode == 0 and "SUMMARY: 0 " in run.stdout, run.stdout[-4000:] + run.stderr[-4000:]
