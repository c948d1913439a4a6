"""The reference backend: `arithmetic` over every run of blocks, in pure torch, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..arithmetic.blocks import block_views
from ..arithmetic.rounding import counters, is_stochastic, shape_key, step_key
from ..arithmetic.scalars import StepScalars
from ..arithmetic.step import adamw_step_, microadam_step_
from ..config import MicroAdamConfig
from ..layout import DENSE_TENSORS, BlockRun, DenseRun
from .base import TensorStep
from .tensors import count_steps

# Blocks are independent, so a large run is worked off in pieces to bound the temporaries (about 100 bytes per element).
CHUNK_NUMEL = 1 << 20


class ReferenceBackend:
    """Runs everywhere torch runs; the oracle of every other backend."""

    name = "reference"

    def check(self, device: torch.device) -> None:
        """Every valid setting runs on every device."""

    def step(self, tensors: Sequence[TensorStep], config: MicroAdamConfig, grad_scale: float) -> int:
        """See `Backend.step`."""
        skipped: list[Tensor] = []
        for tensor in tensors:
            scalars = StepScalars.at(tensor.step, config, grad_scale)
            key = step_key(config.seed, tensor.step) if is_stochastic(config.rounding, tensor.param.dtype) else None
            for run in tensor.layout.runs:
                for rows in _chunks(run):
                    blocks = block_views(tensor.layout, run, tensor.param, tensor.grad, tensor.state, rows, key)
                    skipped.append(microadam_step_(blocks, tensor.layout.config, run.num_kept, tensor.step, scalars))
            if tensor.grad is not None:
                skipped += [
                    self._dense_step(tensor, tensor.grad, dense, scalars, key) for dense in tensor.layout.dense_runs
                ]
        count_steps(tensors)
        return int(torch.stack(skipped).sum()) if skipped else 0

    @staticmethod
    def _dense_step(tensor: TensorStep, grad: Tensor, dense: DenseRun, scalars: StepScalars, key: int | None) -> Tensor:
        local = slice(dense.start, dense.start + dense.numel)
        moments = slice(dense.state_start, dense.state_start + dense.numel)
        exp_avg, exp_avg_sq = (tensor.state[name].view(-1)[moments] for name in DENSE_TENSORS)
        param, span = tensor.param.view(-1)[local], tensor.layout.spans[dense.span_index]
        positions = torch.arange(span.start, span.start + span.numel, device=param.device)
        places = None if key is None else counters(positions, key, shape_key(span.global_shape))
        return adamw_step_(param, grad.view(-1)[local], exp_avg, exp_avg_sq, scalars, places)


def _chunks(run: BlockRun) -> Iterator[range]:
    rows_per_chunk = max(1, CHUNK_NUMEL // (run.cols * run.numel))
    for start in range(0, run.rows, rows_per_chunk):
        yield range(start, min(start + rows_per_chunk, run.rows))
