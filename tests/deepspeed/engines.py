"""Tiny models whose gradients are given, and DeepSpeed engines around them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from tests.ranks import rank_device

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "window_size": 4, "density": 0.05, "block_size": 256}


class Holder(nn.Module):
    """One parameter; its gradient is exactly the tensor passed in, whatever its value."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, grad: Tensor) -> Tensor:
        return (self.weight * grad.to(self.weight.device)).sum()


class GivenGradients(nn.Module):
    """Matrices, norms and a convolution; rows with and without a short last block."""

    SHAPES = {
        "embed": (61, 96),
        "norm": (96,),
        "up": (40, 301),
        "bias": (301,),
        "conv": (32, 16, 3, 3),
        "down": (96, 80),
    }

    def __init__(self) -> None:
        super().__init__()
        for name, shape in self.SHAPES.items():
            setattr(self, name, Holder(*shape))

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self, name)(grad) for name, grad in grads.items()]).sum()


def make_model(dtype: torch.dtype = torch.float32) -> GivenGradients:
    torch.manual_seed(0)
    return GivenGradients().to(rank_device(), dtype)


def make_gradients(num_steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Gradients whose average over equal ranks is exact: over 2 or 4 in any dtype, over 3 in fp32."""
    generator = torch.Generator().manual_seed(1)

    def gradient(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * 2**16).round() * 3 / 2**16 if dtype == torch.float32 else values.to(dtype)

    return [{name: gradient(shape) for name, shape in GivenGradients.SHAPES.items()} for _ in range(num_steps)]


def make_config(stage: int, dtype: torch.dtype, params: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default is 1.0
        "optimizer": {"type": "MicroAdam", "params": SETTINGS if params is None else params},
        **extra,
    }
    config["zero_optimization"] = {"stage": stage, **extra.get("zero_optimization", {})}
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, **extra.get("bf16", {})}
    return config


def initialize(model: nn.Module, config: dict[str, Any], **kwargs: Any) -> Any:
    """`deepspeed.initialize` without its chatter and without its shared-memory op."""
    import deepspeed
    from deepspeed.utils import logger

    from microadam_dist.deepspeed import disable_shm_allreduce

    logger.setLevel(logging.ERROR)
    disable_shm_allreduce()
    kwargs.setdefault("model_parameters", model.parameters())
    if "optimizer" in kwargs:
        config = {key: value for key, value in config.items() if key != "optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=config, **kwargs)
    return engine


def base_optimizer(engine: Any) -> Any:
    """Our optimizer under DeepSpeed's wrappers."""
    return engine.basic_optimizer


def full_weights(engine: Any) -> dict[str, Tensor]:
    """The model's weights, gathered where ZeRO-3 has cut them."""
    import deepspeed

    weights = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            weights[name.removesuffix(".weight")] = param.detach().clone()
    return weights


def train(engine: Any, gradients: list[dict[str, Tensor]]) -> None:
    for grads in gradients:
        engine.backward(engine(grads))
        engine.step()
