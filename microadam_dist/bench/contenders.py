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
from ..layout import WINDOW_TENSORS
from ..optimizer import MicroAdam
from .workload import ROW_NUMEL, Tensors, Workload

BASELINE = "AdamW fused"
FOREACH = "AdamW foreach"
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
        only: Parts of the names of those that take part beside the baseline, in any case; empty: all.
    """

    device: torch.device
    configs: dict[str, MicroAdamConfig]
    isas: tuple[str, ...] = ()
    reference: bool = True
    deepspeed: bool = False
    in_backward: bool = False
    only: tuple[str, ...] = ()

    def selects(self, name: str) -> bool:
        """Whether a contender takes part."""
        return not self.only or any(part.lower() in name.lower() for part in self.only)


def needed_bytes(workload: Workload, dtype: torch.dtype, comparison: Comparison, together: bool) -> int:
    """What the contenders and their first steps allocate at least.

    Args:
        workload, dtype: Of weights and gradients.
        comparison: Which contenders there are.
        together: All of them at once; otherwise one after another, and AdamW has the largest state.
    """
    names = contender_names(comparison)
    numbers = 2  # weights and gradients
    state = [0.6 * name.startswith("MicroAdam") for name in names]  # bytes a parameter, at least
    state += [2.0 * dtype.itemsize for name in names if name in (BASELINE, FOREACH)]
    state += [1.0 * dtype.itemsize for name in names if name == COPY]
    return int(workload.numel * (numbers * dtype.itemsize + (sum(state) if together else max(state))))


def free_bytes(device: torch.device) -> int:
    """Memory that is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def contender_names(comparison: Comparison) -> list[str]:
    """Those that take part, the copy first; whether they can is seen when they are made."""
    return list(_makers(comparison))


def contender_makers(
    workload: Workload, dtype: torch.dtype, comparison: Comparison
) -> dict[str, Callable[[], Contender]]:
    """By name what makes each contender, for new parameters that all of them update."""
    tensors = small = Tensors(workload, dtype, comparison.device)
    if comparison.reference and workload.numel > REFERENCE_NUMEL:
        small = Tensors(Workload("", ((REFERENCE_NUMEL // ROW_NUMEL, ROW_NUMEL),)), dtype, comparison.device)
    return {name: partial(make, tensors, small) for name, make in _makers(comparison).items()}


def _makers(comparison: Comparison) -> dict[str, Callable[[Tensors, Tensors], Contender]]:
    """They are given the tensors, and few of them for what is slow."""
    makers: dict[str, Callable[[Tensors, Tensors], Contender]] = {COPY: _copy}
    config = next(iter(comparison.configs.values()))
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    for name, make in _others(comparison).items():
        makers[name] = partial(_other, name=name, make=make, settings=settings)
    for backend, isa in _backends(comparison):
        for setting, config in comparison.configs.items():
            for in_backward in (False, True)[: 1 + comparison.in_backward]:
                how = "in backward" if in_backward else None
                name = " ".join(filter(None, ["MicroAdam", setting, backend, isa, how]))
                makers[name] = partial(
                    _microadam, name=name, config=config, backend=backend, isa=isa, in_backward=in_backward
                )
    return {name: make for name, make in makers.items() if name == BASELINE or comparison.selects(name)}


def _backends(comparison: Comparison) -> Iterator[tuple[str, str | None]]:
    yield from ((comparison.device.type, isa) for isa in comparison.isas or (None,))
    if comparison.reference:
        yield "reference", None


def _others(comparison: Comparison) -> dict[str, Callable[..., Optimizer]]:
    adamw = torch.optim.AdamW
    others: dict[str, Callable[..., Optimizer]] = {
        BASELINE: partial(adamw, fused=True),
        FOREACH: partial(adamw, foreach=True),
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


def _other(
    tensors: Tensors, small: Tensors, *, name: str, make: Callable[..., Optimizer], settings: dict[str, float]
) -> Contender:
    return _contender(name, tensors, make(tensors.params, **settings))


def _microadam(
    tensors: Tensors,
    small: Tensors,
    *,
    name: str,
    config: MicroAdamConfig,
    backend: str,
    isa: str | None,
    in_backward: bool,
) -> Contender:
    ours = small if backend == "reference" else tensors
    with _environment("MICROADAM_CPU_ISA", isa):
        optimizer = MicroAdam(ours.params, backend=backend, **asdict(config))
    contender = _contender(name, ours, optimizer)
    if in_backward:
        contender.step = partial(_step_in_backward, optimizer, ours.params)
    return contender


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


def _copy(tensors: Tensors, small: Tensors) -> Contender:
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
