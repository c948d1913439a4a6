"""A tiny model whose gradients are given, plain or sharded by FSDP, and everything it and its optimizer hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from microadam_dist import MicroAdam
from tests.ranks import rank_device

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "window_size": 4, "density": 0.05, "block_size": 256}
SHAPES = {
    "embed": (61, 96),  # uneven
    "few": (3, 1500),  # no row on the last of 4 ranks
    "odd": (40, 301),  # blocks of two lengths
    "conv": (32, 16, 3, 3),
    "norm": (61,),  # the others take the dense path
    "tiny": (2,),
    "thin": (50, 5),
}


class Given(nn.Module):
    """One parameter; its gradient is exactly the tensor passed in, whatever its value."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad.to(self.weight.device)).sum()


class GivenGradients(nn.Module):
    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, Given(*shape))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self, name)(grad) for name, grad in grads.items()]).sum()


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> GivenGradients:
    torch.manual_seed(seed)
    return GivenGradients(**kwargs).to(rank_device(), dtype)


def shard(model: nn.Module, **kwargs: Any) -> nn.Module:
    """``fully_shard`` with two children of their own and the others together."""
    from torch.distributed.fsdp import fully_shard

    for child in list(model.children())[:2]:
        fully_shard(child, **kwargs)
    return fully_shard(model, **kwargs)


def wrap(model: nn.Module, **options: Any) -> nn.Module:
    """FSDP1 with two children of their own and the others together."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    fsdp = functools.partial(FSDP, device_id=rank_device(), **{"use_orig_params": True, **options})
    for name in ("embed", "few"):
        setattr(model, name, fsdp(getattr(model, name)))
    return fsdp(model)


def make_optimizer(model: nn.Module, **options: Any) -> MicroAdam:
    """Three groups: the second one packs its window, the third one has none where the options allow it."""
    named = list(model.named_parameters())
    window_size = 2 if options.get("weight_exchange") == "newest" else 1
    other = {"window_size": window_size, "density": 0.1, "weight_decay": 0.0, "ef_bits": 1.6}
    groups = [{"params": named[:2]}, {"params": named[2:3], "packed_window": True}, {"params": named[3:], **other}]
    return MicroAdam([group for group in groups if group["params"]], **SETTINGS, **options)


def gradient(step: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Its average over 1, 2 or 4 equal ranks is exact in any dtype, over 3 in fp32; some rows are zero."""
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name))
    values = (torch.randn(SHAPES[name], generator=generator) * 2**16).round() * 3 / 2**16
    if step % 3 == 0:
        values[1:] = 0
    return values.to(dtype)


def gradients(step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: gradient(step, name, dtype) for name in SHAPES}


def inject(model: nn.Module, step: int) -> None:
    """Set all gradients, as a backward pass of that step would leave them."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, param in model.named_parameters():
        grad = gradient(step, name.removesuffix(".weight"), param.dtype).to(param.device)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad


def train(model: nn.Module, optimizer: MicroAdam, steps: Iterable[int]) -> None:
    for step in steps:
        inject(model, step)
        optimizer.step()
        optimizer.zero_grad()


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> None:
    model(gradients(step, dtype)).backward()


def everything(optimizer: MicroAdam) -> dict[str, Tensor]:
    """Weights and state of the whole model, by name; a collective where it is sharded."""
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            found[name] = whole(param)
            for key, value in optimizer.state.get(param, {}).items():
                found[f"{name}.{key}"] = whole(value)
    return found


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    differing = [
        name
        for name, tensor in expected.items()
        if got[name].dtype != tensor.dtype or not torch.equal(got[name].cpu(), tensor.cpu())
    ]
    assert not differing, differing


def message_of(error: type[Exception], function: Callable[[], Any]) -> str:
    """What the error says that ``function`` must raise."""
    try:
        function()
    except error as raised:
        return str(raised)
    raise AssertionError(f"{error.__name__} was not raised")
