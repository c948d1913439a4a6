"""The optimizers that are compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..config import MicroAdamConfig
from ..errors import MicroAdamError
from ..layout import WINDOW_TENSORS
from ..optimizer import MicroAdam
from .workload import ROW_NUMEL, Tensors, Workload

BASELINE = "AdamW fused"
COPY = "copy"
REFERENCE_NUMEL = 1 << 20  # it takes a hundred times as long as a kernel


@dataclass
class Contender:
    """One line of the results.

    Attributes:
        name: Of the line.
        tensors: What it updates.
        step: One optimizer step.
        state_bytes: Bytes of its state, once there is any.
        floor_bytes: Bytes that one fused pass over memory moves at least.
    """

    name: str
    tensors: Tensors
    step: Callable[[], None]
    state_bytes: Callable[[], int]
    floor_bytes: Callable[[], int]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        device: ``cpu`` or ``cuda``.
        configs: Settings of MicroAdam, by their name.
        isas: Instruction sets of the CPU kernel; empty for the best one.
        reference: Whether the pure PyTorch backend takes part.
        deepspeed: Whether DeepSpeedCPUAdam does, whose op is compiled at first use.
        in_backward: Whether MicroAdam also steps tensor by tensor, as it does where gradients are released.
    """

    device: torch.device
    configs: dict[str, MicroAdamConfig]
    isas: tuple[str, ...] = ()
    reference: bool = True
    deepspeed: bool = False
    in_backward: bool = False


def needed_bytes(workload: Workload, dtype: torch.dtype, comparison: Comparison) -> int:
    """What `make_contenders` and their first step allocate at least."""
    ours = len(comparison.configs) * len(comparison.isas or (None,)) * (1 + comparison.in_backward)
    numbers = 3 + 2 + 2  # weights, gradients and the copy; the moments of AdamW, fused and foreach
    return workload.numel * (numbers * dtype.itemsize + ours)


def free_bytes(device: torch.device) -> int:
    """Memory that is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_contenders(
    workload: Workload, dtype: torch.dtype, comparison: Comparison
) -> tuple[list[Contender], dict[str, str]]:
    """All contenders that can run here, the copy first; and by name why the others cannot.

    They update the same parameters, so that only their states add up.
    """
    tensors = Tensors(workload, dtype, comparison.device)
    contenders, missing = [_copy(tensors)], {}
    config = next(iter(comparison.configs.values()))
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    for name, make in _others(comparison).items():
        try:
            contenders.append(_contender(name, tensors, make(tensors.params, **settings)))
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = str(error)
    small = Tensors(Workload("", ((REFERENCE_NUMEL // ROW_NUMEL, ROW_NUMEL),)), dtype, comparison.device)
    for backend, isa in _backends(comparison):
        for setting, config in comparison.configs.items():
            name = " ".join(filter(None, ["MicroAdam", setting, backend, isa]))
            ours = small if backend == "reference" and workload.numel > REFERENCE_NUMEL else tensors
            try:
                contenders.append(_contender(name, ours, _microadam(ours, config, backend, isa)))
                if comparison.in_backward and ours is tensors:
                    optimizer = _microadam(ours, config, backend, isa)
                    contenders.append(_contender(f"{name} in backward", ours, optimizer))
                    contenders[-1].step = partial(_step_in_backward, optimizer, ours.params)
            except MicroAdamError as error:
                missing[name] = str(error)
    return contenders, missing


def _backends(comparison: Comparison) -> Iterator[tuple[str, str | None]]:
    yield from ((comparison.device.type, isa) for isa in comparison.isas or (None,))
    if comparison.reference:
        yield "reference", None


def _others(comparison: Comparison) -> dict[str, Callable[..., Optimizer]]:
    adamw = torch.optim.AdamW
    others: dict[str, Callable[..., Optimizer]] = {
        BASELINE: partial(adamw, fused=True),
        "AdamW foreach": partial(adamw, foreach=True),
    }
    if comparison.device.type == "cuda":
        return others | {
            "torchao AdamW8bit": partial(_imported, "torchao.optim", "AdamW8bit"),
            "torchao AdamW4bit": partial(_imported, "torchao.optim", "AdamW4bit"),
            "bitsandbytes AdamW8bit": partial(_imported, "bitsandbytes.optim", "AdamW8bit"),
        }
    deepspeed = partial(_imported, "deepspeed.ops.adam", "DeepSpeedCPUAdam")
    return others | {"DeepSpeedCPUAdam": deepspeed if comparison.deepspeed else _not_asked_for}


def _imported(module: str, name: str, params: list[Tensor], **settings: float) -> Optimizer:
    optimizer: Optimizer = getattr(import_module(module), name)(params, **settings)
    return optimizer


def _not_asked_for(*_: Any, **__: Any) -> Optimizer:
    raise RuntimeError("not asked for: --deepspeed lets DeepSpeed compile its op, which takes a minute")


def _microadam(tensors: Tensors, config: MicroAdamConfig, backend: str, isa: str | None) -> MicroAdam:
    with _environment("MICROADAM_CPU_ISA", isa):
        return MicroAdam(tensors.params, backend=backend, **asdict(config))


def _step_in_backward(optimizer: MicroAdam, params: Iterable[Tensor]) -> None:
    for param in params:
        optimizer.step_in_backward(param, 0)
    optimizer.zero_grad()
    optimizer.step()  # ends the step


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def _copy(tensors: Tensors) -> Contender:
    source, target = tensors.gradients(0), [torch.empty_like(p) for p in tensors.params]

    def step() -> None:
        for to, values in zip(target, source, strict=True):
            to.copy_(values)

    return Contender(COPY, tensors, step, lambda: 0, lambda: 2 * _num_bytes(target))


def _contender(name: str, tensors: Tensors, optimizer: Optimizer) -> Contender:
    def state() -> dict[str, int]:
        totals: dict[str, int] = {}
        for of_param in optimizer.state.values():
            for key, value in of_param.items():
                if isinstance(value, Tensor) and key != "step":
                    totals[key] = totals.get(key, 0) + _stored_bytes(value)
        return totals

    def floor_bytes() -> int:
        window_size = optimizer.param_groups[0].get("window_size", 1)
        total = 3 * _num_bytes(tensors.params)  # the gradient is read, the weights are read and written
        for key, nbytes in state().items():
            # Of the window all slots are read and one is written.
            total += nbytes + (nbytes // window_size if key in WINDOW_TENSORS else nbytes)
        return total

    return Contender(name, tensors, optimizer.step, lambda: sum(state().values()), floor_bytes)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of the tensors it is made of, where it is a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
