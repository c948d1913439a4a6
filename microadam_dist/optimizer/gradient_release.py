"""Gradient release: every parameter is updated in the backward pass, and its gradient freed at once.

    release_gradients(model, optimizer)
    for batch in data:
        loss(model(batch)).backward()  # updates the weights
        optimizer.step()  # ends the step
        scheduler.step()

The gradients of the whole model never exist together, only that of one parameter (under FSDP2: of one module). What
needs all of them becomes impossible, and raises: a released gradient leaves a `ReleasedGradient` behind.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.base import Shard
from ..engines.local import has_ddp
from ..errors import ConfigError, UnsupportedLayoutError
from .microadam import MicroAdam

_with_release: weakref.WeakSet[MicroAdam] = weakref.WeakSet()


def release_gradients(model: nn.Module, optimizer: MicroAdam) -> GradientRelease:
    """Update each parameter as soon as its gradient is complete, and free the gradient.

    For one device and FSDP2; the bits are those of the normal step. ``optimizer.step()`` is still called after each
    backward pass: it ends the step, and updates what has a gradient nevertheless, normally nothing. Schedulers follow
    it as usual.

    - Gradient accumulation: under FSDP2 with ``model.set_requires_gradient_sync(False)`` in all backward passes of a
      step but the last. On one device a second backward pass before ``step()`` or ``zero_grad()`` raises.
    - Reading a released gradient raises, so `torch.nn.utils.clip_grad_norm_` and `torch.amp.GradScaler` do.

    Args:
        model: The model that is trained, after ``fully_shard``.
        optimizer: Holds its parameters. Those that do not require a gradient now are left to ``optimizer.step()``.

    Returns:
        A handle; its ``remove()`` brings the normal step back.

    Raises:
        UnsupportedLayoutError: Gradients are reduced after they are accumulated: DDP, FSDP1, DeepSpeed.
        ConfigError: The optimizer is no `MicroAdam`, holds tensors that are no parameters of the model, has nothing to
            release, or was given before.
    """
    if not isinstance(optimizer, MicroAdam):
        raise ConfigError(
            f"release_gradients takes the MicroAdam itself, and this is {type(optimizer)}. Under Accelerate give it "
            "the optimizer that was passed to prepare; under DeepSpeed gradients cannot be released."
        )
    if optimizer in _with_release:
        raise ConfigError("the gradients of this optimizer are released already; remove() that handle first.")
    if has_ddp(model):
        raise UnsupportedLayoutError(
            "DistributedDataParallel averages gradients after they are accumulated, so gradients cannot be released: "
            "each rank would use its own. Use fully_shard (FSDP2), or the normal step."
        )
    if optimizer.names.sharded is not None:
        raise UnsupportedLayoutError(
            "DeepSpeed holds this optimizer, and reduces and steps after the backward pass: gradients cannot be "
            "released. Use the normal step."
        )
    _require_same_parameters(model, optimizer)
    if not any(param.requires_grad for group in optimizer.param_groups for param in group["params"]):
        raise ConfigError("no parameter of the optimizer requires a gradient: there is none to release. Thaw it first.")
    return GradientRelease(optimizer)


class GradientRelease:
    """The handle of `release_gradients`."""

    def __init__(self, optimizer: MicroAdam) -> None:
        self._optimizer = optimizer
        self._shards = optimizer.sharded.shards()
        for shard in self._shards.values():
            _require_final_grad(shard)
        self._released: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = [optimizer.register_step_pre_hook(self._end_step)]
        for index, group in enumerate(optimizer.param_groups):
            for param in filter(lambda param: param.requires_grad, group["params"]):
                update = functools.partial(self._update, group_index=index)
                self._handles.append(param.register_post_accumulate_grad_hook(update))
        _with_release.add(optimizer)

    def remove(self) -> None:
        """Back to the normal step: from now on gradients stay until ``optimizer.step()``."""
        for handle in self._handles:
            handle.remove()
        self._forget()
        _with_release.discard(self._optimizer)

    def _update(self, param: Tensor, group_index: int) -> None:
        shard = self._shards[param]
        _require_final_grad(shard)  # again: ranks may have found together since
        self._optimizer.step_in_backward(param, group_index)
        param.grad = None
        if param not in self._released:
            self._released[param] = shard.wrap(ReleasedGradient(shard))
        param.grad = self._released[param]

    def _end_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Runs before ``optimizer.step``, which must not see released gradients, nor those its closure makes."""
        self._forget()
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def evaluate() -> Any:
            loss = closure()
            self._forget()
            return loss

        return args[:1], {"closure": evaluate}

    def _forget(self) -> None:
        for param, released in self._released.items():
            if param.grad is released:
                param.grad = None


class ReleasedGradient(Tensor):
    """What a released gradient leaves in its place: a tensor without data, which no operation can use.

    With None instead, clipping would find nothing to clip, and a second backward pass nothing to add to, silently.
    """

    fqn: str

    @staticmethod
    def __new__(cls, shard: Shard) -> ReleasedGradient:
        """Stands for the local gradient of ``shard``."""
        like = shard.param
        released: ReleasedGradient = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        released.fqn = shard.name
        return released

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedGradient({self.fqn!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse."""
        operands = args[0] if isinstance(args[0], (list, tuple)) else args
        fqn = next((operand.fqn for operand in operands if isinstance(operand, ReleasedGradient)), None)
        raise ConfigError(
            f"{func} needs the gradient of parameter {fqn!r}, which was released in the backward pass (see "
            "microadam_dist.release_gradients). Clipping by the global norm, GradScaler and gradient accumulation on "
            "one device need all gradients: call remove() on the release and use the normal step. Gradients can still "
            "be clipped one by one, in a register_post_accumulate_grad_hook made before the release, and accumulated "
            "under FSDP2 with set_requires_gradient_sync(False)."
        )


def _require_same_parameters(model: nn.Module, optimizer: MicroAdam) -> None:
    parameters = set(model.parameters())
    for index, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            if param not in parameters:
                raise ConfigError(
                    f"param group {index} holds a tensor of shape {tuple(param.shape)} that is no parameter of the "
                    "model. Construct the optimizer with the model's parameters, after fully_shard. Under DeepSpeed "
                    "gradients cannot be released: ZeRO-2 and 3 shard them."
                )


def _require_final_grad(shard: Shard) -> None:
    if not shard.has_final_grad:
        raise UnsupportedLayoutError(
            f"the gradient of parameter {shard.name!r} cannot be released: several ranks train together, and it is "
            "still to be reduced (DDP, FSDP1, DeepSpeed, by hand) when the backward pass has accumulated it. Shard the "
            "model with fully_shard (FSDP2), or use the normal step."
        )
