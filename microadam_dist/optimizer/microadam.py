"""MicroAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from ..backends.base import CapturableBackend, DeviceInputs, TensorStep
from ..backends.select import select_backend
from ..config import LATER_SETTINGS, SETTING_NAMES, MicroAdamConfig, adam_settings, check_flag, reject_unknown_settings
from ..diagnostics.metrics import Meter
from ..engines.base import ExchangedBytes, ExchangeSettings, Replayed, Rows, ShardState
from ..engines.collectives import any_rank
from ..engines.find import introduce
from ..engines.row_exchange import make_exchange
from ..errors import ConfigError, MicroAdamError
from .checked import CheckedSettings
from .nonfinite import NonfiniteCounter
from .sharded_state import PARAM_DTYPES, Part, ShardedState, StateBytes


class MicroAdam(Optimizer):
    """Adam with 0.56 bytes of state per parameter.

    Keeps a 4-bit error feedback and a window of the last sparse Top-K gradients, from which the moments are recomputed
    at every step. With the default window, 1, only the newest counts and none is stored. Vectors and small matrices
    (norms, biases) take AdamW with fp32 moments.

    Args:
        params: Parameters, named parameters or param groups; fp32, bf16 or fp16, frozen ones of any dtype. The settings
            up to ``seed`` may be given per group.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`; start at 3 times its best learning rate, with a warmup
            over the first tenth of the run.
        window_size: Number of sparse gradients kept (``m`` in the paper). 1 stores no window at all.
        density: Fraction of each block kept by Top-K (``k_init``).
        block_size: Longest Top-K block.
        bucket_size: Elements whose error-feedback codes share one range or scale (``quant_block_size``).
        ef_bits: Bits of one error-feedback code: 0 (off), 1, 1.6 (three levels, five codes in a byte), 2, 4 or 8.
        packed_window: Store the window in 12-bit indices and 8-bit values: 0.82 instead of 0.96 bytes of state
            per parameter at window 10, density 0.01. What 8 bits leave stays in the error feedback.
        correction: What the sums over the window are divided by to become moments: ``"window"``, what the slots in it
            weigh, so that a steady coordinate moves by ``lr`` at any time; ``"steps"``, the paper's 1 - beta^t.
        rounding: Of the new weights to their dtype: ``"nearest"``, ``"stochastic"`` (for bf16, where an update of less
            than half a bf16 step would be lost), or ``"auto"``, stochastic where bf16 weights are stepped. The noise is
            a function of seed, step and position, so the bits are the same on any ranks and after a resume.
        seed: Of stochastic rounding, in 0..2**32 - 1.
        backend: ``"auto"`` or the name of a backend; a named one never falls back to another.
        sparse_allgather: Under DeepSpeed ZeRO-1, 2: after the step send only the weights that changed, see
            `engines.deepspeed_sparse`; the bytes are counted in ``exchanged_bytes``. The weights are the same.
        shard_state: Under DDP: true, a process group or a 1-D DeviceMesh whose ranks share the state. Each steps some
            rows of every parameter, and gets the other rows from the rank that steps them. The weights are the same.
        weight_exchange: With ``shard_state``, what travels: ``"touched"`` (the default), the weights that changed, or
            ``"newest"``, the newest Top-K, which is less but replicates the window; see `engines.row_exchange`.
        capturable: Count the steps on the GPU and read ``lr`` (if it is a tensor there) and what GradScaler found there
            too, so that a step waits for nothing and can be captured in a CUDA graph. Needs ``backend="cuda"``.
        metrics_every: Measure every so many steps how well the gradients are compressed, see ``metrics``; 0 is off.
        unknown: Settings of other Adams that change nothing here (``fused``, ``amsgrad=False``, ...) are accepted with
            a warning, here and in param groups, so that an AdamW configuration needs only its type changed.

    Raises:
        ConfigError: A setting is unknown or outside its range, or a parameter has an unsupported dtype.

    Source: MicroAdam, arXiv:2405.15593.
    """

    _is_constructed = False  # torch's constructor adds the first groups

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
        ef_bits: float = 4,
        packed_window: bool = False,
        correction: str = "window",
        rounding: str = "auto",
        seed: int = 0,
        backend: str = "auto",
        sparse_allgather: bool = False,
        shard_state: ShardState = False,
        weight_exchange: str | None = None,
        capturable: bool = False,
        metrics_every: int = 0,
        **unknown: Any,
    ) -> None:
        arguments = locals()
        reject_unknown_settings(unknown)
        defaults = {name: arguments[name] for name in SETTING_NAMES}
        defaults = _with_numbers(defaults, MicroAdamConfig.from_dict({**defaults, **unknown}))
        check_flag("capturable", capturable)
        exchange_settings = ExchangeSettings(sparse_allgather, shard_state, weight_exchange)
        if capturable and backend not in ("auto", "cuda"):
            raise ConfigError(f'capturable=True with backend={backend!r}: only backend="cuda" can be captured.')
        if capturable and exchange_settings.shards_state:
            raise ConfigError("capturable=True with shard_state: the exchange of weights cannot be captured.")
        if capturable and metrics_every:
            raise ConfigError("capturable=True with metrics_every: what is measured is read on the host.")
        super().__init__(params, defaults)
        self.capturable = capturable
        # True: GradScaler hands over its scale and overflow flag. False: it rewrites the gradients and skips the step
        # itself; then they can be clipped, and all ranks agree on an overflow.
        self._step_supports_amp_scaling = capturable
        self.exchange_settings = exchange_settings
        self.exchanged_bytes = ExchangedBytes()
        self._backend = select_backend("cuda" if capturable else backend)
        self._exchange = make_exchange(exchange_settings, self.exchanged_bytes)
        self.sharded = ShardedState(self._exchange, counts_on_device=capturable)
        self.sharded.bind(self)
        self.names = self.sharded.names
        self._meter = Meter(metrics_every) if metrics_every else None
        self._nonfinite = NonfiniteCounter()
        self._settings: defaultdict[int, CheckedSettings] = defaultdict(CheckedSettings)  # by position of the group
        for group in self.param_groups:
            self._adopt(group)
        self._is_constructed = True
        _warn_of_meaningless(chain(unknown, *self.param_groups))
        introduce(type(self))

    @staticmethod
    def paper_defaults() -> dict[str, Any]:
        """Window, density and correction of the paper: ``MicroAdam(params, lr, **MicroAdam.paper_defaults())``."""
        return {"window_size": 10, "density": 0.01, "correction": "steps"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its own settings override the defaults.

        Raises:
            ConfigError: A setting or a parameter's dtype is not supported.
        """
        keys = [key for key in param_group if key not in ("params", "param_names")]
        # Every group of torch's AdamW has "capturable": False.
        given = (key for key in keys if key != "capturable" or param_group[key])
        reject_unknown_settings(given, misspelled_only=True)
        config = MicroAdamConfig.from_dict({**self.defaults, **param_group})
        super().add_param_group(_with_numbers(param_group, config))
        if self._is_constructed:
            try:
                self._adopt(self.param_groups[-1])
            except MicroAdamError:
                self.param_groups.pop()
                raise
            _warn_of_meaningless(keys)

    def _adopt(self, group: Mapping[str, Any]) -> None:
        """Check a new param group, and remember what its parameters are called."""
        config, params = MicroAdamConfig.from_dict(group), group["params"]
        first = sum(map(len, self.names.groups))
        names = group.get("param_names") or [str(first + i) for i in range(len(params))]
        for name, param in zip(names, params, strict=True):
            if param.requires_grad:
                self._check(name, param, config)
        if self._exchange is not None:
            self._exchange.check(config)
        self.names.add_group(names, params)

    def _check(self, name: str, param: Tensor, config: MicroAdamConfig) -> None:
        """Raise if a parameter cannot be trained with these settings."""
        if param.dtype not in PARAM_DTYPES:
            raise ConfigError(f"parameter {name!r} is {param.dtype}; MicroAdam trains fp32, bf16, fp16.")
        self._backend.check(param.device)

    def state_bytes(self) -> StateBytes:
        """State this rank holds now, as allocated (step counters not counted)."""
        return self.sharded.state_bytes()

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

    # ---------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the gradients are read, never overwritten.

        The state in ``optimizer.state`` is checked whenever a tensor there has been replaced. `torch.amp.GradScaler`
        divides the gradients in place before it calls this; with ``capturable`` its factor is applied here.

        The very first call with nothing but zero gradients only allocates the state: DeepSpeed (stage 0) and
        `torch.distributed.checkpoint` make such a call to see the state, and it must not count as a step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            UnsupportedLayoutError: A parameter is sharded in a way that is not supported. Nothing has been changed.
            ConfigError: A setting was changed to an invalid one, or a dtype. Nothing has been changed.
            CheckpointMismatchError: State does not fit its parameter. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        configs = [self._config(index) for index in range(len(self.param_groups))]
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        was_empty = self.sharded.is_empty
        parts = self._prepare(configs, members)
        if was_empty and self._is_probe(list(chain.from_iterable(parts))):
            return loss

        # Both are set by GradScaler for this call only.
        from_scaler = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        skipped = []
        for group, config, own in zip(self.param_groups, configs, parts, strict=True):
            inputs = _device_inputs(group, *from_scaler) if self.capturable else 1.0
            skipped.append(self._step_group(own, config, inputs))
        self._nonfinite.add(skipped)
        if self._meter is not None:
            self._meter.end_step(self)
        return loss

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
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # `no_grad` does the same in five times the time
        try:
            group, config = self.param_groups[group_index], self._config(group_index)
            (parts,) = self._prepare([config], [[param]])
            inputs = _device_inputs(group, None, None) if self.capturable else 1.0
            self._nonfinite.add_part(self._step_group(parts, config, inputs))
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _config(self, group_index: int) -> MicroAdamConfig:
        """The settings of a group; a learning rate that is read on the device counts as 0."""
        group: Mapping[str, Any] = self.param_groups[group_index]
        if self.capturable and isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
            group = {**group, "lr": 0.0}
        return self._settings[group_index].config(group)

    def _step_group(self, parts: Sequence[Part], config: MicroAdamConfig, inputs: float | DeviceInputs) -> int | Tensor:
        """Step some tensors of a group with a factor on the gradients, or with what lies on the device."""
        if self._exchange is None:
            return self._update(parts, config, inputs)
        exchanged = {part.shard.tensor: part for part in parts if part.shard.is_exchanged}
        rows = []
        for p, part in exchanged.items():
            state = self.sharded.local(p)
            rows.append(Rows(part.shard, part.layout, state, int(state["step"])))

        def update(tensors: Sequence[Tensor]) -> int | Tensor:
            return self._update([exchanged[p] for p in tensors], config, inputs)

        replay = functools.partial(self._replay, config=config)
        own = [part for part in parts if not part.shard.is_exchanged]
        return self._exchange.step(rows, config, update, replay) + self._update(own, config, inputs)

    def _update(self, parts: Sequence[Part], config: MicroAdamConfig, inputs: float | DeviceInputs) -> int | Tensor:
        """Step this rank's part of these tensors; returns the number of skipped blocks."""
        self.sharded.note_step()
        params = [part.param.contiguous() for part in parts]
        counts_here = not self.capturable
        steps = [
            TensorStep(
                param,
                part.grad.contiguous(),
                state,
                part.layout,
                int(state["step"].item()) if counts_here else 0,
                state["step"],
            )
            for part, param, state in zip(parts, params, self.sharded.states(parts), strict=True)
        ]
        if isinstance(inputs, DeviceInputs):
            assert isinstance(self._backend, CapturableBackend)
            num_skipped = self._backend.step_on_device(steps, config, inputs)
        else:
            if self._meter is not None and self._meter.is_due(self.param_groups):
                sharding_groups = [part.shard.sharding_group for part in parts]
                self._meter.measure(zip(steps, sharding_groups, strict=True), config, inputs)
            num_skipped = self._backend.step(steps, config, inputs)
        _write_back([part.param for part in parts], params)
        return num_skipped

    def _replay(self, replayed: Sequence[Replayed], config: MicroAdamConfig) -> None:
        """Update weights from windows that other ranks have filled."""
        weights = [part.weights.detach() for part in replayed]
        params = [tensor.contiguous() for tensor in weights]
        steps = [
            TensorStep(param, None, part.window, part.layout, part.step)
            for param, part in zip(params, replayed, strict=True)
        ]
        self._backend.step(steps, config, 1.0)
        _write_back(weights, params)

    def _prepare(self, configs: Sequence[MicroAdamConfig], groups: Sequence[Sequence[Tensor]]) -> list[list[Part]]:
        """Make state where there is none, unless something is not supported; returns what is known of the tensors."""
        new = self.sharded.find_new(chain.from_iterable(groups))
        parts = list(map(self.sharded.require_unchanged, groups, configs, repeat(new)))
        if not new:
            return parts
        self.sharded.require_one_structure(new)
        for p, layout in new.items():
            self._check(self.sharded.shard(p).name, p, layout.config)
        if self.exchange_settings.sparse_allgather and self.names.sharded is None:
            raise ConfigError(
                "sparse_allgather=True is for DeepSpeed's ZeRO stages 1 and 2, and DeepSpeed does not hold this "
                "optimizer: remove it. For DDP there is shard_state; FSDP gathers weights by itself."
            )
        self.sharded.accept(new)
        return parts

    def _is_probe(self, parts: Sequence[Part]) -> bool:
        """Whether a first call is made only to see the state: all gradients are zero, on all ranks that must agree."""
        # A rank that has nothing to step answers others that have.
        shards = [part.shard for part in parts] or list(self.sharded.shards().values())
        if not all(shard.may_be_probed for shard in shards):
            return False
        # The number of nonzero elements, without a temporary tensor (`any` makes one of bools).
        is_nonzero = any(bool(torch.linalg.vector_norm(part.grad, 0)) for part in parts)
        return not any_rank(is_nonzero, (group for shard in shards for group in shard.groups))

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> StateDict:
        """The state as torch's optimizers give it, and what it describes; see `ShardedState.describe`."""
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            state_dict = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        self.sharded.describe(state_dict)
        for post_hook in hooks.values():  # last, as torch runs them: what they return may be anything
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict bit for bit; state belongs to parameters by position, whatever their keys.

        Raises:
            CheckpointMismatchError: The state does not fit. The optimizer is left as it was.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.sharded.load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def is_saved_apart(self) -> bool:
        """See `ShardedState.is_saved_apart`."""
        return self.sharded.is_saved_apart

    def __getstate__(self) -> dict[str, Any]:
        # The base class leaves out its hooks, and everything it does not know.
        hooks = {name for name in self.__dict__ if name.startswith("_optimizer_")}
        own = {name: value for name, value in self.__dict__.items() if name not in hooks}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({**LATER_SETTINGS, **group})
        self.sharded.bind(self)


def _write_back(tensors: Sequence[Tensor], contiguous: Sequence[Tensor]) -> None:
    """After pointers have written to tensors or, where they are not row-major, to contiguous copies of them."""
    for tensor, written in zip(tensors, contiguous, strict=True):
        if written is not tensor:
            tensor.copy_(written)
    # A backward pass that still needs the old values must notice.
    torch.autograd.graph.increment_version(contiguous)


def _with_numbers(settings: Mapping[str, Any], config: MicroAdamConfig) -> dict[str, Any]:
    """The settings as numbers: what came as a string or from NumPy cannot be scheduled, or compared in a checkpoint."""
    return {
        key: getattr(config, key) if key in SETTING_NAMES and not isinstance(value, Tensor) else value
        for key, value in settings.items()
    }


def _warn_of_meaningless(names: Iterable[str]) -> None:
    """One warning for all settings of other Adams among the names."""
    if found := dict.fromkeys(adam_settings(names)):
        warnings.warn(f"MicroAdam ignores {', '.join(found)}: settings of other optimizers.", stacklevel=3)


def _device_inputs(group: Mapping[str, Any], loss_scale: Tensor | None, found_inf: Tensor | None) -> DeviceInputs:
    """What a captured step reads on the device."""
    on_device = (x if isinstance(x, Tensor) and x.is_cuda else None for x in (group["lr"], loss_scale, found_inf))
    return DeviceInputs(*on_device)
