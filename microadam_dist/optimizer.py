"""MicroAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .backends.base import CapturableBackend, DeviceInputs, TensorStep
from .backends.select import select_backend
from .config import SETTING_NAMES, STRUCTURAL_SETTINGS, MicroAdamConfig, reject_unknown_settings
from .diagnostics.metrics import Meter
from .engines.base import (
    ExchangedBytes,
    NamedParameter,
    any_rank,
    engines,
    row_exchange,
)
from .errors import ConfigError, MicroAdamError, UnsupportedLayoutError
from .layout import StateLayout
from .nonfinite import NonfiniteCounter
from .sharded_optimizer import ShardedOptimizer
from .state import allocate_state

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MicroAdam(ShardedOptimizer):
    """Adam with 0.56 bytes of state a parameter.

    Keeps a 4-bit error feedback and a window of the last sparse Top-K gradients, from which the moments are recomputed
    at every step. With the default window, 1, only the newest counts and none is stored. Vectors and small matrices
    (norms, biases) take AdamW with fp32 moments.

    Args:
        params: Parameters, named parameters or param groups; fp32, bf16 or fp16. The settings up to ``packed_window``
            may be given per group.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`; start at 2 to 4 times its best learning rate.
        window_size: Number of sparse gradients kept (``m`` in the paper). 1 stores no window at all.
        density: Fraction of each block kept by Top-K (``k_init``).
        block_size: Longest Top-K block.
        bucket_size: Elements that share one quantization range (``quant_block_size``).
        ef_bits: Bits of one error-feedback code: 0 (off), 2, 4 or 8.
        packed_window: Store the window in 12-bit indices and 8-bit values: 0.82 instead of 0.96 bytes of state a
            parameter at window 10, density 0.01. What 8 bits leave stays in the error feedback.
        backend: ``"auto"`` or the name of a backend; a named one never falls back to another.
        sparse_allgather: Under DeepSpeed ZeRO-1, 2: after the step send only the weights that changed, see
            `engines.deepspeed_sparse`; the bytes are counted in ``exchanged_bytes``. The weights are the same.
        shard_state: Under DDP: true, a process group or a 1-D DeviceMesh whose ranks share the state. Each steps some
            rows of every parameter, and gets the other rows from the rank that steps them. The weights are the same.
        weight_exchange: With ``shard_state``, what travels: ``"touched"``, the weights that changed, or ``"newest"``,
            the newest Top-K, which is less but replicates the window; see `engines.row_exchange`.
        capturable: Count the steps on the GPU and read ``lr`` (if it is a tensor there) and what GradScaler found there
            too, so that a step waits for nothing and can be captured in a CUDA graph. Needs ``backend="cuda"``.
        metrics_every: Measure every so many steps how well the gradients are compressed, see ``metrics``; 0 is off.

    Raises:
        ConfigError: A setting is unknown or outside its range, or a parameter has an unsupported dtype.

    Source: MicroAdam, arXiv:2405.15593.
    """

    # GradScaler hands over its scale and overflow flag instead of rewriting the gradients.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window_size: int = 1,
        density: float = 0.1,
        block_size: int = 4096,
        bucket_size: int = 64,
        ef_bits: int = 4,
        packed_window: bool = False,
        backend: str = "auto",
        sparse_allgather: bool = False,
        shard_state: Any = False,
        weight_exchange: str = "touched",
        capturable: bool = False,
        metrics_every: int = 0,
        **unknown: Any,
    ) -> None:
        reject_unknown_settings(unknown)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "window_size": window_size,
            "density": density,
            "block_size": block_size,
            "bucket_size": bucket_size,
            "ef_bits": ef_bits,
            "packed_window": packed_window,
        }
        defaults = _with_numbers(defaults, MicroAdamConfig.from_dict(defaults))
        for name, flag in (("sparse_allgather", sparse_allgather), ("capturable", capturable)):
            if not isinstance(flag, bool):
                raise ConfigError(f"{name}={flag!r}: expected true or false.")
        if capturable and backend not in ("auto", "cuda"):
            raise ConfigError(f'capturable=True with backend={backend!r}: only backend="cuda" can be captured.')
        self.sparse_allgather = sparse_allgather
        self.capturable = capturable
        self.exchanged_bytes = ExchangedBytes()
        if capturable and shard_state:
            raise ConfigError("capturable=True with shard_state: the exchange of weights cannot be captured.")
        if capturable and metrics_every:
            raise ConfigError("capturable=True with metrics_every: what is measured is read on the host.")
        self._meter = Meter(metrics_every) if metrics_every else None
        self._backend = select_backend("cuda" if capturable else backend)
        self._nonfinite = NonfiniteCounter()
        exchange = row_exchange(shard_state, weight_exchange, self.exchanged_bytes)
        super().__init__(params, defaults, exchange=exchange, counts_on_device=capturable)
        for engine in engines():
            engine.whitelist(type(self))

    @staticmethod
    def paper_defaults() -> dict[str, Any]:
        """The window and density of the paper: ``MicroAdam(params, lr, **MicroAdam.paper_defaults())``."""
        return {"window_size": 10, "density": 0.01}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own settings override the defaults.

        Raises:
            ConfigError: A setting or a parameter's dtype is not supported.
        """
        keys = [key for key in param_group if key not in ("params", "param_names")]
        reject_unknown_settings(keys, misspelled_only=True)
        config = MicroAdamConfig.from_dict({**self.defaults, **param_group})
        super().add_param_group(_with_numbers(param_group, config))
        group = self.param_groups[-1]
        first = sum(len(members) for members in self._constructed)
        names = group.get("param_names") or [str(first + i) for i in range(len(group["params"]))]
        try:
            for name, param in zip(names, group["params"], strict=True):
                if param.dtype not in _PARAM_DTYPES:
                    raise ConfigError(f"parameter {name!r} is {param.dtype}; MicroAdam trains fp32, bf16, fp16.")
                self._backend.check(config, param.device)
            if self._exchange is not None:
                self._exchange.check(config)
        except MicroAdamError:
            self.param_groups.pop()
            raise
        self._constructed.append([NamedParameter.of(*pair) for pair in zip(names, group["params"], strict=True)])

    @property
    def num_nonfinite_blocks(self) -> int:
        """Blocks skipped so far on this rank because of a NaN, an Inf or a magnitude of 2**60 in the accumulator."""
        return self._nonfinite.total

    @property
    def metrics_every(self) -> int:
        """Every how many steps ``metrics`` are measured; 0 is never."""
        return 0 if self._meter is None else self._meter.every

    @property
    def metrics(self) -> dict[str, float]:
        """Of the newest step measured (``metrics_every``), estimated from a sample: see `diagnostics.metrics`.

        The same on all ranks that share the parameters. A new dictionary for each such step, empty before the first.
        """
        return {} if self._meter is None else self._meter.metrics

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the gradients are read, never overwritten.

        The very first call with nothing but zero gradients only allocates the state: DeepSpeed (stage 0) and
        `torch.distributed.checkpoint` make such a call to see the state, and it must not count as a step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            UnsupportedLayoutError: A parameter is sharded in a way that is not supported. Nothing has been changed.
            ConfigError: A setting was changed to an invalid one. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        found_inf: Tensor | None = getattr(self, "found_inf", None)  # both are set by GradScaler for this call only
        loss_scale: Tensor | None = getattr(self, "grad_scale", None)
        if not self.capturable and found_inf is not None and float(found_inf):  # a plain 0 when there is no gradient
            return loss
        groups = [
            (self._config(group), [p for p in group["params"] if p.grad is not None]) for group in self.param_groups
        ]
        if self._prepare(groups) and self._is_probe([p for _, members in groups for p in members]):
            return loss

        grad_scale = 1.0 if loss_scale is None or self.capturable else 1.0 / float(loss_scale)
        skipped = []
        for group, (config, members) in zip(self.param_groups, groups, strict=True):
            inputs = _device_inputs(group, loss_scale, found_inf) if self.capturable else grad_scale
            skipped.append(self._step_group(members, config, inputs))
        self._nonfinite.add(skipped)
        if self._meter is not None:
            self._meter.end_step(self)
        return loss

    @torch.no_grad()
    def step_in_backward(self, param: Tensor, group_index: int) -> None:
        """Update one parameter that has just got its gradient, as its part of a step; see `gradient_release`.

        A gradient of a backward pass is never a synthetic one, so it always counts as a step.

        Args:
            param: A parameter with a gradient.
            group_index: Its param group.

        Raises:
            UnsupportedLayoutError: As `step`.
            ConfigError: As `step`.
        """
        group = self.param_groups[group_index]
        config = self._config(group)
        self._prepare([(config, [param])])
        inputs = _device_inputs(group, None, None) if self.capturable else 1.0
        self._nonfinite.add([self._step_group([param], config, inputs)])

    def _config(self, group: Mapping[str, Any]) -> MicroAdamConfig:
        """The settings of a group; a learning rate that is read on the device counts as 0."""
        if self.capturable and isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
            group = {**group, "lr": 0.0}
        return MicroAdamConfig.from_dict(group)

    def _step_group(
        self, members: Sequence[Tensor], config: MicroAdamConfig, inputs: float | DeviceInputs
    ) -> int | Tensor:
        """Step some tensors of a group with a factor on the gradients, or with what lies on the device."""
        update = functools.partial(self._update, config=config, inputs=inputs)
        if self._exchange is None:
            return update(members)
        shared = [p for p in members if self._shards[p].groups]
        rows = [(self._shards[p], self._layouts[p], self._local_state(p), int(self.state[p]["step"])) for p in shared]
        replay = functools.partial(self._backend.step, config=config, grad_scale=1.0)
        num_skipped: int | Tensor = self._exchange.step(rows, config, update, replay)
        return num_skipped + update([p for p in members if not self._shards[p].groups])

    def _update(self, members: Sequence[Tensor], config: MicroAdamConfig, inputs: float | DeviceInputs) -> int | Tensor:
        """Step this rank's part of these tensors; returns the number of skipped blocks."""
        self._has_loaded_shards = False
        shards = [self._shards[p] for p in members]
        params = [shard.param for shard in shards]
        states = [self._unwrapped_state(p, shard) for p, shard in zip(members, shards, strict=True)]
        counters = [state["step"] for state in states]
        fields = (
            [param.contiguous() for param in params],
            [shard.grad.contiguous() for shard in shards],
            states,
            [self._layouts[p] for p in members],
            [0 if self.capturable else int(counter) for counter in counters],
            counters,
        )
        steps = [TensorStep(*row) for row in zip(*fields, strict=True)]
        if self._meter is not None and not isinstance(inputs, DeviceInputs) and self._meter.is_due(self.param_groups):
            sharding_groups = [shard.sharding_group for shard in shards]
            self._meter.measure(zip(steps, sharding_groups, strict=True), config, inputs)
        if isinstance(inputs, DeviceInputs):
            assert isinstance(self._backend, CapturableBackend)
            num_skipped = self._backend.step_on_device(steps, config, inputs)
        else:
            num_skipped = self._backend.step(steps, config, inputs)
        for param, step in zip(params, steps, strict=True):
            if step.param is not param:  # not row-major in memory
                param.copy_(step.param)
        # A kernel writes through a pointer; a backward pass that still needs the old values must notice.
        torch.autograd.graph.increment_version([step.param for step in steps])
        return num_skipped

    def _prepare(self, groups: Sequence[tuple[MicroAdamConfig, Sequence[Tensor]]]) -> bool:
        """Make state where there is none, unless something is not supported; returns whether there was none at all."""
        is_first_call = not any(self.state.get(p) for p in self._layouts)  # state may have been cleared
        without_state = [p for _, members in groups for p in members if not self.state.get(p)]
        for p in without_state:
            self._layouts.pop(p, None)
        layouts = self._find_layouts(without_state)
        for config, members in groups:
            self._require_supported(members, config, {**self._layouts, **layouts} if layouts else self._layouts)
        for p, layout in layouts.items():
            self._backend.check(layout.config, p.device)
        for p, layout in layouts.items():
            step = torch.zeros((), dtype=torch.int64, device=self._step_device(p))
            self._set_state(p, layout, {"step": step, **allocate_state(layout, p.device)})
        return is_first_call

    def _is_probe(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a first call is made only to see the state: all gradients are zero, on all ranks that must agree."""
        # A rank that has nothing to step answers others that have.
        shards = [self._shards[p] for p in tensors] or list(self.shards().values())
        if not all(shard.may_be_probed for shard in shards):
            return False
        # The number of nonzero elements, without a temporary tensor (`any` makes one of bools).
        grads = [self._shards[p].grad for p in tensors]
        return not any_rank(any(bool(torch.linalg.vector_norm(grad, 0)) for grad in grads), shards)

    def _require_supported(
        self, members: Sequence[Tensor], config: MicroAdamConfig, layouts: Mapping[Tensor, StateLayout]
    ) -> None:
        """The gradients can be used, and the settings and the shapes are those that state is laid out for."""
        unchanged = None
        for p in members:
            shard, made_for = self._shards[p], layouts[p].config
            for name in STRUCTURAL_SETTINGS if made_for is not unchanged else ():
                if getattr(config, name) != getattr(made_for, name):
                    raise ConfigError(
                        f"{name}={getattr(config, name)!r}: the state of parameter {shard.name!r} was made with "
                        f"{getattr(made_for, name)!r}. It cannot change once state exists; set it back, or "
                        "construct a new optimizer."
                    )
            unchanged = made_for
            if shard.param.shape != shard.local_shape:
                raise UnsupportedLayoutError(
                    f"parameter {shard.name!r} has shape {tuple(shard.param.shape)} now, its state was made for "
                    f"{shard.local_shape}. Construct a new optimizer after changing a parameter's shape."
                )
            _ = shard.grad  # raises if it cannot be used


def _with_numbers(settings: Mapping[str, Any], config: MicroAdamConfig) -> dict[str, Any]:
    """The settings as numbers: what came as a string or from NumPy cannot be scheduled, or compared in a checkpoint."""
    return {
        key: getattr(config, key) if key in SETTING_NAMES and not isinstance(value, Tensor) else value
        for key, value in settings.items()
    }


def _device_inputs(group: Mapping[str, Any], loss_scale: Tensor | None, found_inf: Tensor | None) -> DeviceInputs:
    """What a captured step reads on the device."""
    on_device = (x if isinstance(x, Tensor) and x.is_cuda else None for x in (group["lr"], loss_scale, found_inf))
    return DeviceInputs(*on_device)
