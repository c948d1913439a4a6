"""The optimizers of a study: MicroAdam and real libraries to compare it with, and the bytes they allocate."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

NamedParameters = list[tuple[str, nn.Parameter]]


def _torch_optimizer(name: str) -> Callable[..., Optimizer]:
    def build(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
        return getattr(torch.optim, name)(params, lr=lr, **settings)

    return build


def _microadam(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
    from microadam_dist import MicroAdam

    return MicroAdam(params, lr=lr, **settings)


def _microadam_fp32_error(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
    from .fp32_error import MicroAdamFp32Error

    return MicroAdamFp32Error(params, lr=lr, **settings)


def _torchao(name: str) -> Callable[..., Optimizer]:
    def build(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)([param for _, param in params], lr=lr, **settings)

    return build


def _bitsandbytes(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([param for _, param in params], lr=lr, **settings)


def _galore(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
    """The matrices of attention and MLP are projected, as in GaLore's own training script; the rest is plain AdamW."""
    from galore_torch import GaLoreAdamW

    projected = [param for name, param in params if param.ndim == 2 and ("attn" in name or "mlp" in name)]
    others = [param for name, param in params if all(param is not matrix for matrix in projected)]
    groups = [{"params": others}, {"params": projected, **settings}]
    return GaLoreAdamW(groups, lr=lr, weight_decay=0.0, no_deprecation_warning=True)


def _came(params: NamedParameters, lr: float, **settings: Any) -> Optimizer:
    from came_pytorch import CAME

    return CAME([param for _, param in params], lr=lr, **settings)


# Name in the YAML -> what builds it, and the package it comes from.
BUILDERS: dict[str, tuple[Callable[..., Optimizer], str]] = {
    "microadam": (_microadam, "microadam-dist"),
    "microadam_fp32_error": (_microadam_fp32_error, "microadam-dist"),
    "adamw": (_torch_optimizer("AdamW"), "torch"),
    "sgd": (_torch_optimizer("SGD"), "torch"),
    "adafactor": (_torch_optimizer("Adafactor"), "torch"),
    "adamw8bit_torchao": (_torchao("AdamW8bit"), "torchao"),
    "adamw4bit_torchao": (_torchao("AdamW4bit"), "torchao"),
    "adamw8bit_bitsandbytes": (_bitsandbytes, "bitsandbytes"),
    "galore": (_galore, "galore-torch"),
    "came": (_came, "came-pytorch"),
}


def build_optimizer(type_name: str, params: NamedParameters, lr: float, settings: dict[str, Any]) -> Optimizer:
    """An optimizer of one of the `BUILDERS`.

    Raises:
        ImportError: Its package is not installed.
    """
    return BUILDERS[type_name][0](params, lr, **settings)


def package_version(type_name: str) -> str:
    """Name and version of the package an optimizer comes from."""
    package = BUILDERS[type_name][1]
    version = torch.__version__ if package == "torch" else importlib.metadata.version(package)
    return f"{package} {version}"


def why_unavailable(type_name: str, settings: dict[str, Any], device: str) -> str | None:
    """Why an optimizer cannot run here, found by two steps of it on a small layer; None if it can."""
    layer = nn.ModuleDict({"mlp": nn.Linear(128, 128, device=device)})
    try:
        optimizer = build_optimizer(type_name, list(layer.named_parameters()), 1e-3, settings)
        for _ in range(2):
            layer["mlp"](torch.ones(4, 128, device=device)).square().sum().backward()
            optimizer.step()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed: pip install -e '.[study]'"
    except Exception as error:  # whatever a library raises where it cannot run
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, as allocated; a tensor that parameters share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in _tensors(list(optimizer.state.values()))}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Plain tensors in nested state: containers, tensor subclasses (torchao) and objects (GaLore's projector)."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        elif value.numel():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
