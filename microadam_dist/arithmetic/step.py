"""One MicroAdam step on a grid of equal blocks, in torch: the definition every kernel is compared with.

Source: MicroAdam, arXiv:2405.15593, Algorithms 1 and 2. Everything is computed in fp32 and rounded once after every
operation, in the order written here; scalars are computed in float64 and rounded once to fp32 (`StepScalars`). The
bits of the result are the contract: no fused multiply-add (hence no ``add(alpha=)``, ``addcmul`` or ``lerp``), exact
square roots and divisions, ties to the lowest index. New weights are rounded to their dtype once, see `rounding`.

Shapes: B blocks of n elements, k kept in each, q buckets of ``bucket_size`` elements (the last may be shorter).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import MicroAdamConfig
from .blocks import Blocks, map_tensors
from .error_feedback import StoredError, decode_error, encode_error
from .rounding import counters_from, round_weights, step_key
from .scalars import MAGNITUDE_LIMIT, StepScalars
from .window import Slot, decode_slot, encode_slot


def microadam_step_(blocks: Blocks, config: MicroAdamConfig, num_kept: int, step: int, scalars: StepScalars) -> Tensor:
    """One step on B blocks. In place: parameter, error feedback and window; the gradient is only read.

    Args:
        blocks: Views of the blocks. Without a gradient their newest slot is in the window already, put there by another
            rank, and only the weights are updated.
        config: Gives bucket size, code width and window size.
        num_kept: k.
        step: Steps taken before this one.
        scalars: The scalars of this step.

    Returns:
        Number of blocks skipped because their accumulator is not finite, 0-dim int64.
    """
    window_size = config.window_size
    if blocks.grad is None:
        finite = torch.ones(blocks.param.shape[:2].numel(), 1, dtype=torch.bool, device=blocks.param.device)
        slots = []
    else:
        accumulator = accumulate(blocks, blocks.grad, config, scalars)
        newest, _, finite = keep_largest_(blocks, accumulator, config, num_kept, step)
        if blocks.window is not None:
            blocks.window.store_(step % window_size, newest)
        slots = [decode_slot(newest)]  # by age, 0 = newest
    slots += stored_slots(blocks, [(step - age) % window_size for age in range(len(slots), len(scalars.m_weights))])
    update_weights_(blocks, slots, finite, scalars)
    return (~finite).sum()


def accumulate(blocks: Blocks, grad: Tensor, config: MicroAdamConfig, scalars: StepScalars) -> Tensor:
    """Gradient and error: ``a = g * grad_scale + (codes * step + lo)``, (B, n) fp32."""
    accumulator = grad.flatten(0, 1).float() * scalars.grad_scale
    error = stored_error(blocks, config)
    return accumulator if error is None else accumulator + error


def stored_error(blocks: Blocks, config: MicroAdamConfig) -> Tensor | None:
    """The error feedback, (B, n) fp32; None where it is switched off."""
    if blocks.error is None:
        return None
    stored: StoredError = map_tensors(lambda part: part.flatten(0, 1), blocks.error)
    return decode_error(stored, blocks.param.shape[2], bits=config.ef_bits, bucket_size=config.bucket_size)


def stored_slots(blocks: Blocks, slots: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(B, k) int64 indices and (B, k) fp32 values of slots of the window; none where no window is stored."""
    return [] if blocks.window is None else [decode_slot(blocks.window.slot(number)) for number in slots]


def keep_largest_(
    blocks: Blocks, accumulator: Tensor, config: MicroAdamConfig, num_kept: int, step: int
) -> tuple[Slot, Tensor, Tensor]:
    """Top-K of the accumulator (B, n). In place: the error feedback of the blocks takes what is left.

    Returns:
        slot: The newest slot, indices ascending.
        residual: (B, n) fp32, what is left.
        finite: (B, 1) bool; a block where it is false is skipped.
    """
    # key = |bf16(a)|;  I = the k largest keys, ties to the lowest index, ascending;  V = bf16(a[I])
    rounded = accumulator.bfloat16()
    finite = (rounded.abs() < MAGNITUDE_LIMIT).all(dim=1, keepdim=True)
    indices = largest_magnitudes(rounded, num_kept)
    # The slot of a skipped block is stored empty: zeros at the first k places, which add nothing anywhere.
    indices = torch.where(finite, indices, torch.arange(num_kept, device=indices.device))
    slot = encode_slot(indices, torch.where(finite, rounded.gather(1, indices), 0), config.packed_window)

    # a[I] = 0, packed: a[I] -= V as it is stored; and the residual becomes the new error, quantized
    left = accumulator.gather(1, indices) - decode_slot(slot)[1] if config.packed_window else 0.0
    residual = accumulator.scatter(1, indices, left)
    if blocks.error is not None:
        key = step_key(config.seed, step)
        error = encode_error(residual, bits=config.ef_bits, bucket_size=config.bucket_size, zero_key=key)
        for stored, new in zip(blocks.error, error, strict=True):
            if stored is not None and new is not None:
                _assign_where_(stored, finite, new)
    return slot, residual, finite


def update_weights_(
    blocks: Blocks, slots: Sequence[tuple[Tensor, Tensor]], finite: Tensor, scalars: StepScalars
) -> None:
    """Moments from the window, and the update. In place: the weights of the blocks.

    Args:
        blocks: The blocks, B = rows * cols.
        slots: (B, k) int64 indices and (B, k) fp32 values of the valid slots by age, 0 = newest.
        finite: (B, 1) bool; the weights of other blocks stay as they are.
        scalars: The scalars of this step.
    """
    new = blocks.param.flatten(0, 1).float()  # (B, n)

    # M = sum b1^r V_r,  V = sum b2^r V_r^2, oldest to newest; indices are unique inside a slot
    m_sum, v_sum = torch.zeros_like(new), torch.zeros_like(new)
    touched = torch.zeros_like(new, dtype=torch.bool)
    for age in reversed(range(len(slots))):
        index, value = slots[age]
        m_sum.scatter_(1, index, m_sum.gather(1, index) + value * scalars.m_weights[age])
        v_sum.scatter_(1, index, v_sum.gather(1, index) + (value * value) * scalars.v_weights[age])
        touched.scatter_(1, index, True)

    # p = p * (1 - lr*wd);  p[touched] -= lr * (m / (eps + sqrt(v)))
    update = adam_direction(m_sum * scalars.m_factor, v_sum * scalars.v_factor, scalars.eps) * scalars.lr
    new = new * scalars.decay
    new = torch.where(touched, new - update, new)
    first = blocks.counters
    counters = None if first is None else counters_from(first.flatten(0, 1), new.shape[1])
    _assign_where_(blocks.param, finite, round_weights(new, blocks.param.dtype, counters))


def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: StepScalars,
    counters: Tensor | None = None,
) -> Tensor:
    """One AdamW step on the dense path, elementwise. In place: ``param`` and both fp32 moments, all (n,).

    An element whose gradient is not finite (see `MAGNITUDE_LIMIT`) is skipped. ``counters``: see `rounding`.

    Returns:
        1 if any element was skipped, else 0; 0-dim int64.

    Source: AdamW, arXiv:1711.05101; the order of operations is ours.
    """
    # m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
    scaled = grad.float() * scalars.grad_scale
    finite = scaled.bfloat16().abs() < MAGNITUDE_LIMIT
    m = exp_avg * scalars.beta1 + scaled * scalars.one_minus_beta1
    v = exp_avg_sq * scalars.beta2 + (scaled * scaled) * scalars.one_minus_beta2

    # p = p * (1 - lr*wd) - lr * (m_hat / (eps + sqrt(v_hat)))
    update = adam_direction(m * scalars.m_correction, v * scalars.v_correction, scalars.eps) * scalars.lr
    new_param = round_weights(param.float() * scalars.decay - update, param.dtype, counters)
    for old, new in ((param, new_param), (exp_avg, m), (exp_avg_sq, v)):
        old.copy_(torch.where(finite, new, old))
    return (~finite).any().long()


def largest_magnitudes(rounded: Tensor, num_kept: int) -> Tensor:
    """Positions of the ``num_kept`` largest magnitudes of every row, ties to the lowest index, ascending.

    Args:
        rounded: (B, n) bf16, n <= 32768.

    Returns:
        (B, num_kept) int64.
    """
    numel = rounded.shape[1]
    # The bits of a non-negative bf16 order like its value. With the reversed index in the low bits every key is
    # unique, so Top-K has one answer on every device.
    magnitude = rounded.view(torch.int16).int() & 0x7FFF
    key = magnitude * 0x10000 + torch.arange(numel - 1, -1, -1, dtype=torch.int32, device=rounded.device)
    return key.topk(num_kept, dim=1, sorted=False).indices.sort(dim=1).values


def adam_direction(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """``m / (eps + sqrt(v))``."""
    # sqrt of torch on CPU is not correctly rounded in fp32; a float64 square root rounded to fp32 is exact.
    return m / (v.double().sqrt().float() + eps)


def _assign_where_(target: Tensor, blocks: Tensor, new: Tensor) -> None:
    """Round ``new`` (B, x) to the dtype of ``target`` (rows, cols, x) and store it for the blocks marked in (B, 1)."""
    shape = target.shape
    target.copy_(torch.where(blocks.view(shape[0], shape[1], 1), new.to(target.dtype).view(shape), target))
