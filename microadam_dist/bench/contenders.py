"""The optimizers that are compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..config import MicroAdamConfig
from ..errors import MicroAdamError
from ..optimizer import MicroAdam
from .workload import ROW_NUMEL, Tensors, Workload

BASELINE = "AdamW fused"
COPY = "copy"
REFERENCE_NUMEL = 1 << 20  # it takes a hundred times as long as a kernel

_STREAMED_ONCE = ("indices", "values")  # window tensors: all slots are read, one is written


@dataclass
class Contender:
    """One line of the results.

    Attributes:
        name: Of the line.
        tensors: What it updates.
        step: One optimizer step, given the number of steps before.
        state_bytes: Bytes of its state, once there is any.
        floor_bytes: Bytes that one fused pass over memory would move; the rest of the state moves in and out once.
    """

    name: str
    tensors: Tensors
    step: Callable[[int], None]
    state_bytes: Callable[[], int]
    floor_bytes: Callable[[], int]


@dataclass(frozen=True)
class Field:
    """What a comparison consists of.

    Attributes:
        device: ``cpu`` or ``cuda``.
        configs: Settings of MicroAdam, by their name.
        isas: Instruction sets of the CPU kernel; empty for the best one.
        reference: Whether the pure PyTorch backend takes part.
        deepspeed: Whether DeepSpeedCPUAdam does, whose op is compiled at first use.
    """

    device: torch.device
    configs: dict[str, MicroAdamConfig]
    isas: tuple[str, ...] = ()
    reference: bool = True
    deepspeed: bool = False


def make_contenders(workload: Workload, dtype: torch.dtype, field: Field) -> tuple[list[Contender], dict[str, str]]:
    """All contenders that can run here, the copy first; and by name why the others cannot.

    They update the same parameters, so that only their states add up.
    """
    tensors = Tensors(workload, dtype, field.device)
    contenders, missing = [_copy(tensors)], {}
    decay = next(iter(field.configs.values())).weight_decay
    for name, make in _others(field).items():
        try:
            contenders.append(_contender(name, tensors, make(tensors.params, lr=1e-3, weight_decay=decay)))
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = str(error)
    small = Tensors(Workload("", ((REFERENCE_NUMEL // ROW_NUMEL, ROW_NUMEL),)), dtype, field.device)
    for backend, isa in _backends(field):
        for setting, config in field.configs.items():
            name = " ".join(filter(None, ["MicroAdam", setting, backend, isa]))
            ours = small if backend == "reference" and workload.numel > REFERENCE_NUMEL else tensors
            try:
                contenders.append(_contender(name, ours, _microadam(ours, config, backend, isa)))
            except MicroAdamError as error:
                missing[name] = str(error)
    return contenders, missing


def _backends(field: Field) -> Iterator[tuple[str, str | None]]:
    yield from ((field.device.type, isa) for isa in field.isas or (None,))
    if field.reference:
        yield "reference", None


def _others(field: Field) -> dict[str, Callable[..., Optimizer]]:
    def adamw(**kind: bool) -> Callable[..., Optimizer]:
        return lambda params, **settings: torch.optim.AdamW(params, **kind, **settings)

    others = {BASELINE: adamw(fused=True), "AdamW foreach": adamw(foreach=True)}
    if field.device.type == "cuda":
        return others | {
            "torchao AdamW8bit": lambda params, **settings: _torchao().AdamW8bit(params, **settings),
            "torchao AdamW4bit": lambda params, **settings: _torchao().AdamW4bit(params, **settings),
            "bitsandbytes AdamW8bit": _bitsandbytes_adamw8bit,
        }
    return others | {"DeepSpeedCPUAdam": deepspeed_cpu_adam if field.deepspeed else _not_asked_for}


def _not_asked_for(*_: Any, **__: Any) -> Optimizer:
    raise RuntimeError("not asked for: --deepspeed lets DeepSpeed compile its op, which takes a minute")


def deepspeed_cpu_adam(params: list[Tensor], **settings: float) -> Optimizer:
    """DeepSpeed's fused AdamW; its op is compiled at first use and kept in torch's extension cache.

    Raises:
        ImportError: DeepSpeed is not installed.
        RuntimeError: The op cannot be compiled.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: Optimizer = DeepSpeedCPUAdam(params, adamw_mode=True, **settings)
    return optimizer


def _torchao() -> Any:
    from torchao import optim

    return optim


def _bitsandbytes_adamw8bit(params: list[Tensor], **settings: float) -> Optimizer:
    import bitsandbytes

    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(params, **settings)
    return optimizer


def _microadam(tensors: Tensors, config: MicroAdamConfig, backend: str, isa: str | None) -> MicroAdam:
    settings = {"window_size": config.window_size, "density": config.density}
    with _environment("MICROADAM_CPU_ISA", isa):
        return MicroAdam(tensors.params, lr=1e-3, weight_decay=config.weight_decay, backend=backend, **settings)


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

    def step(_: int) -> None:
        for to, values in zip(target, source, strict=True):
            to.copy_(values)

    return Contender(COPY, tensors, step, lambda: 0, lambda: 2 * _num_bytes(target))


def _contender(name: str, tensors: Tensors, optimizer: Optimizer) -> Contender:
    def step(_: int) -> None:
        optimizer.step()

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
            total += nbytes + (nbytes // window_size if key in _STREAMED_ONCE else nbytes)
        return total

    return Contender(name, tensors, step, lambda: sum(state().values()), floor_bytes)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _stored_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of the tensors it is made of, where it is a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
