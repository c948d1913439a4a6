"""DeepSpeed's tensor-fragment API: `deepspeed.utils.safe_get_full_optimizer_state` and its siblings, for ZeRO-1 to 3.

DeepSpeed cuts a parameter's state out of the flat state tensors at the place its weights have in the flat shard. Ours
are laid out in another way, so that what it cuts out would be another parameter's. Here its accessors of one engine are
replaced, for optimizer state only; weights and gradients stay with DeepSpeed.

What there is, the moments of parameters on the dense path, follows from their names and global shapes: either all ranks
answer, or all raise before they have said anything to each other.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UnsupportedLayoutError
from ..layout import DENSE_TENSORS, ShardSpan
from .base import StatefulOptimizer


def install(engine: Any, zero: Any) -> None:
    """Replace the accessors of an engine that is being built.

    Args:
        engine: It has our optimizer.
        zero: What it has just wrapped around it: one of the ZeRO optimizers, or BF16_Optimizer.
    """
    install_in = _install_stage3 if hasattr(zero, "fp32_partitioned_groups_flat") else _install_stage1_2
    install_in(zero, Moments(engine))


def _install_stage1_2(zero: Any, moments: Moments) -> None:
    """Each parameter has accessors of its own, new ones whenever it is linked to its part of the flat shard."""
    link = zero._link_all_hp_params

    def link_all() -> None:
        link()
        for param in moments.params():
            _replace_accessors(param, moments)

    zero._link_all_hp_params = link_all
    zero._hp_optimizer_states_linked = True  # else DeepSpeed cuts fragments of its own after the first step
    for param in moments.params():
        _replace_accessors(param, moments)


def _replace_accessors(param: Any, moments: Moments) -> None:
    get_weights, set_weights = param.get_full_hp_param, param.set_full_hp_param

    def get_full(optim_state_key: str | None = None) -> Tensor:
        return get_weights() if optim_state_key is None else moments.get(param, optim_state_key)

    def set_full(value: Tensor, optim_state_key: str | None = None) -> None:
        if optim_state_key is None:
            set_weights(value)
        else:
            moments.set(param, optim_state_key, value)

    param.get_full_hp_param, param.set_full_hp_param = get_full, set_full


def _install_stage3(zero: Any, moments: Moments) -> None:
    """DeepSpeed asks its optimizer, whose answer for a parameter that is frozen now is always None."""
    get_weights, get_local_weights = zero.get_full_hp_param, zero._get_fp32_opt_state_partition
    set_weights, set_local_weights = zero.set_full_hp_param, zero.set_local_hp_param

    def get_full(param: Any, optim_state_key: str | None = None) -> Any:
        if optim_state_key is None or not param.requires_grad:
            return get_weights(param)
        return moments.get(param, optim_state_key)

    def get_local(param: Any, release_swap_buffers: bool, optim_state_key: str | None = None) -> Any:
        weights, sub_group = get_local_weights(param, release_swap_buffers)
        return (weights if optim_state_key is None else moments.get_local(param, optim_state_key)), sub_group

    def set_full(value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if optim_state_key is None or not param.requires_grad:
            set_weights(value, param)
        else:
            moments.set(param, optim_state_key, value)

    def set_local(value: Tensor, param: Any, optim_state_key: str | None = None) -> None:
        if optim_state_key is None or not param.requires_grad:
            set_local_weights(value, param)
        else:
            moments.set_local(param, optim_state_key, value)

    zero.get_full_hp_param, zero._get_fp32_opt_state_partition = get_full, get_local
    zero.set_full_hp_param, zero.set_local_hp_param = set_full, set_local


class Moments:
    """The moments of an engine's parameters on the dense path. Before the first step they are zeros.

    Args:
        engine: A DeepSpeed engine; not kept alive by its parameters, which get methods of this.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.proxy(engine)

    @property
    def _optimizer(self) -> StatefulOptimizer:
        optimizer: StatefulOptimizer = self._engine.basic_optimizer
        return optimizer

    def params(self) -> list[Any]:
        """The parameters DeepSpeed has sharded."""
        return [named.param for group in self._optimizer.names.sharded or () for named in group]

    def get(self, param: Any, key: str) -> Tensor:
        """A moment of a whole parameter in fp32, on the engine's device; a collective of the ranks that share it.

        Raises:
            UnsupportedLayoutError: There is no such moment; on all ranks.
        """
        from deepspeed.accelerator import get_accelerator

        fqn, shape = self._find(param, key)
        moment = torch.zeros(shape, device=get_accelerator().current_device_name())
        for span, part in self._parts(fqn, key):
            moment.view(-1)[span.start : span.start + span.numel] = part
        dist.all_reduce(moment, group=param.ds_process_group if hasattr(param, "ds_id") else param._dp_group)
        return moment

    def set(self, param: Any, key: str, value: Tensor) -> None:
        """Replace a moment; every rank is given the whole one.

        Raises:
            UnsupportedLayoutError: There is no such moment, or it has another number of elements; on all ranks.
        """
        fqn, shape = self._find(param, key)
        _require_numel(fqn, key, value, shape.numel())
        for span, part in self._parts(fqn, key, make=True):
            part.copy_(value.detach().reshape(-1)[span.start : span.start + span.numel])

    def get_local(self, param: Any, key: str) -> Tensor:
        """This rank's part of a moment under ZeRO-3: a copy (numel of the part with its padding,), fp32.

        Raises:
            UnsupportedLayoutError: There is no such moment; on all ranks.
        """
        fqn, _ = self._find(param, key)
        local = torch.zeros(param.partition_numel(), device=param.ds_tensor.device)
        for span, part in self._parts(fqn, key):
            local[: span.numel] = part
        return local

    def set_local(self, param: Any, key: str, value: Tensor) -> None:
        """Replace this rank's part of a moment under ZeRO-3; what is given for the padding is not read.

        Raises:
            UnsupportedLayoutError: There is no such moment, or its part has another number of elements.
        """
        fqn, _ = self._find(param, key)
        _require_numel(fqn, key, value, param.partition_numel())
        for span, part in self._parts(fqn, key, make=True):
            part.copy_(value.detach().reshape(-1)[: span.numel])

    def _find(self, param: Any, key: str) -> tuple[str, torch.Size]:
        """Name and whole shape of a parameter that has this moment; the same answer on every rank."""
        named = self._optimizer.names.find(param)
        fqn = "?" if named is None else named.fqn
        shape = torch.Size(getattr(param, "ds_shape", param.shape))
        if named is None or not any(param is sharded for sharded in self.params()):
            why = "is not trained by this engine"
        elif not ShardSpan.whole(fqn, tuple(shape)).is_dense:
            why = "takes the Top-K path, where state is kept by block, with no number for each element"
        elif key not in DENSE_TENSORS:
            why = f"has {' and '.join(DENSE_TENSORS)} only"
        else:
            return fqn, shape
        raise UnsupportedLayoutError(
            f"optimizer state {key!r} of parameter {fqn!r} of shape {tuple(shape)} was asked for through DeepSpeed's "
            f"tensor-fragment API: the parameter {why}. The API gives and sets the moments of parameters on the dense "
            "path (vectors and small matrices); everything is in optimizer.state_dict() of each rank."
        )

    def _parts(self, fqn: str, key: str, *, make: bool = False) -> list[tuple[ShardSpan, Tensor]]:
        """This rank's intervals of a parameter, and its moment there, flat, not copies; no rank has to have one.

        Args:
            fqn: A parameter on the dense path.
            key: One of its moments.
            make: Whether to make state where there is none yet; else such intervals are left out.
        """
        sharded, parts = self._optimizer.sharded, []
        with filled_param_groups(self._engine):
            for tensor, layout in sharded.layouts().items():
                dense = (span for span in layout.spans if span.is_dense)
                for span, run in zip(dense, layout.dense_runs, strict=True):
                    if span.fqn != fqn or not span.numel:
                        continue
                    state = sharded.made_state(tensor) if make else sharded.flat_state(tensor)
                    if state is not None:
                        parts.append((span, state[key][run.state_start : run.state_start + run.numel]))
        return parts


def _require_numel(fqn: str, key: str, value: Tensor, numel: int) -> None:
    if value.numel() != numel:
        raise UnsupportedLayoutError(
            f"{key!r} of parameter {fqn!r} was to be set to {value.numel()} elements, it has {numel}: give all of them."
        )


@contextlib.contextmanager
def filled_param_groups(engine: Any) -> Iterator[None]:
    """ZeRO-3 keeps the base optimizer's param groups empty between steps; inside this they hold the shards."""
    zero = engine.optimizer
    if not hasattr(zero, "_set_fp32_optimizer_param_groups"):
        yield
        return
    zero._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        zero._clear_fp32_optimizer_param_groups()
