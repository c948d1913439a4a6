"""MicroAdam with an error feedback in fp32: what quantization costs is the difference to it. For studies only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microadam_dist import MicroAdam
from microadam_dist.arithmetic.step import largest_magnitudes
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import UnsupportedLayoutError
from microadam_dist.layout import BlockGrid, ShardSpan


class MicroAdamFp32Error(MicroAdam):
    """`MicroAdam` without its quantized error feedback, given gradient plus an fp32 error as the gradient.

    Raises:
        UnsupportedLayoutError: A parameter whose rows are not cut into equal blocks.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings, ef_bits=0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; the gradients are overwritten."""
        accumulators = []
        for group in self.param_groups:
            config = MicroAdamConfig.from_dict(group)
            for index, param in enumerate(group["params"]):
                span = ShardSpan(str(index), tuple(param.shape), 0, param.numel())
                if param.grad is not None and not span.is_dense:
                    if "error" in self.state[param]:
                        param.grad.add_(self.state[param].pop("error"))
                    accumulators.append((param, config))
        super().step()
        for param, config in accumulators:
            self.state[param]["error"] = _without_largest(param.grad, config)


def _without_largest(accumulator: Tensor, config: MicroAdamConfig) -> Tensor:
    """What Top-K leaves of the accumulator."""
    grid = BlockGrid.from_shape(accumulator.shape, config.block_size)
    if grid.row_numel % grid.block_numel:
        raise UnsupportedLayoutError(f"rows of {grid.row_numel} elements are not cut into equal blocks")
    blocks = accumulator.reshape(-1, grid.block_numel)
    kept = largest_magnitudes(blocks.bfloat16(), config.num_kept(grid.block_numel))
    return blocks.scatter(1, kept, 0.0).view_as(accumulator)
