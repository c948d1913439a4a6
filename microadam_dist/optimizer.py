"""MicroAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .backends.base import TensorStep, select_backend
from .checkpoint.format import APART, APART_KEY, LAYOUT_KEY, describe_layouts, read_layouts
from .checkpoint.match import match_groups, match_names, match_spans, match_tensors, state_dict_parts
from .config import SETTING_NAMES, STRUCTURAL_SETTINGS, MicroAdamConfig, reject_unknown_settings
from .diagnostics.metrics import Meter
from .engines.base import (
    ExchangedBytes,
    NamedParameter,
    Shard,
    Slot,
    any_rank,
    engines,
    find_shard,
    process_rank,
    row_exchange,
)
from .errors import CheckpointMismatchError, ConfigError, MicroAdamError, UnsupportedLayoutError
from .layout import DENSE_TENSORS, StateLayout
from .state import allocate_state, flatten_state, shape_state

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StateBytes(NamedTuple):
    """What this rank has allocated: parameters and bytes of state on the Top-K path and on the dense (AdamW) path."""

    sparse_numel: int
    sparse_bytes: int
    dense_numel: int
    dense_bytes: int


class MicroAdam(Optimizer):
    """Adam with about one byte of state a parameter.

    Keeps a 4-bit error feedback and a window of the last sparse Top-K gradients, from which the moments are recomputed
    at every step. Vectors and small matrices (norms, biases) take AdamW with fp32 moments.

    Args:
        params: Parameters, named parameters or param groups; fp32, bf16 or fp16. The settings up to ``ef_bits`` may be
            given per group.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`.
        window_size: Number of sparse gradients kept (``m`` in the paper). 1 stores no window at all.
        density: Fraction of each block kept by Top-K (``k_init``).
        block_size: Longest Top-K block.
        bucket_size: Elements that share one quantization range (``quant_block_size``).
        ef_bits: Bits of one error-feedback code: 0 (off), 2, 4 or 8.
        backend: ``"auto"`` or the name of a backend; a named one never falls back to another.
        sparse_allgather: Under DeepSpeed ZeRO-1, 2: after the step send only the weights that changed, see
            `engines.deepspeed_sparse`; the bytes are counted in ``exchanged_bytes``. The weights are the same.
        shard_state: Under DDP: true, a process group or a 1-D DeviceMesh whose ranks share the state. Each steps some
            rows of every parameter, and gets the other rows from the rank that steps them. The weights are the same.
        weight_exchange: With ``shard_state``, what travels: ``"touched"``, the weights that changed, or ``"newest"``,
            the newest Top-K, which is less but replicates the window; see `engines.row_exchange`.
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
        window_size: int = 10,
        density: float = 0.01,
        block_size: int = 4096,
        bucket_size: int = 64,
        ef_bits: int = 4,
        backend: str = "auto",
        sparse_allgather: bool = False,
        shard_state: Any = False,
        weight_exchange: str = "touched",
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
        }
        defaults = _with_numbers(defaults, MicroAdamConfig.from_dict(defaults))
        if not isinstance(sparse_allgather, bool):
            raise ConfigError(f"sparse_allgather={sparse_allgather!r}: expected true or false.")
        self.sparse_allgather = sparse_allgather
        self.exchanged_bytes = ExchangedBytes()
        self._exchange = row_exchange(shard_state, weight_exchange, self.exchanged_bytes)
        self._meter = Meter(metrics_every) if metrics_every else None
        self._backend = select_backend(backend)
        self._constructed: list[list[NamedParameter]] = []
        self._shards: dict[Tensor, Shard] = {}  # how the data of a tensor is reached; found with its layout
        self._layouts: dict[Tensor, StateLayout] = {}
        self._num_nonfinite_blocks = 0
        self._has_loaded_shards = False  # and has not stepped since
        super().__init__(params, defaults)
        for engine in engines():
            engine.whitelist(type(self))

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

    def name_parameters(self, names: Mapping[Tensor, str]) -> None:
        """Give parameters the names they have in the model, for checkpoints; parameters not in ``names`` keep theirs.

        DeepSpeed constructs an optimizer from unnamed parameters; its adapter calls this.
        """
        for group in self._constructed:
            group[:] = [replace(named, fqn=names.get(named.param, named.fqn)) for named in group]

    @property
    def num_nonfinite_blocks(self) -> int:
        """Blocks skipped so far on this rank because of a NaN, an Inf or a magnitude of 2**60 in the accumulator."""
        return self._num_nonfinite_blocks

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

    @property
    def shards_state(self) -> bool:
        """Whether the state of replicated parameters is shared by several ranks (``shard_state``)."""
        return self._exchange is not None

    def state_bytes(self) -> StateBytes:
        """State this rank holds now, as allocated (step counters not counted)."""
        totals = [0, 0, 0, 0]
        for tensor, layout in self._layouts.items():
            if not self.state.get(tensor):
                continue
            nbytes = {name: state.nbytes for name, state in self._local_state(tensor).items()}
            dense = sum(nbytes.get(name, 0) for name in DENSE_TENSORS)
            parts = (layout.sparse_numel, sum(nbytes.values()) - dense, layout.dense_numel, dense)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        if self._exchange is not None:
            totals[1] += self._exchange.replica_bytes
        return StateBytes(*totals)

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
        if found_inf is not None and float(found_inf):  # a plain 0 when no parameter has a gradient
            return loss
        grad_scale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)

        groups = [
            (MicroAdamConfig.from_dict(group), [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        tensors = [p for _, members in groups for p in members]
        if self._prepare(tensors) and self._is_probe(tensors):
            return loss
        self._require_unchanged(groups)

        num_skipped = 0
        for config, members in groups:
            num_skipped += self._step_group(members, config, grad_scale)
        self._count_nonfinite(num_skipped)
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
        config = MicroAdamConfig.from_dict(self.param_groups[group_index])
        self._prepare([param])
        self._require_unchanged([(config, [param])])
        self._count_nonfinite(self._step_group([param], config, grad_scale=1.0))

    def _step_group(self, members: Sequence[Tensor], config: MicroAdamConfig, grad_scale: float) -> int:
        update = functools.partial(self._update, config=config, grad_scale=grad_scale)
        if self._exchange is None:
            return update(members)
        shared = [p for p in members if self._shards[p].groups]
        rows = [(self._shards[p], self._layouts[p], self._local_state(p), int(self.state[p]["step"])) for p in shared]
        replay = functools.partial(self._backend.step, config=config, grad_scale=1.0)
        num_skipped: int = self._exchange.step(rows, config, update, replay)
        return num_skipped + update([p for p in members if not self._shards[p].groups])

    def _update(self, members: Sequence[Tensor], config: MicroAdamConfig, grad_scale: float) -> int:
        """Step this rank's part of these tensors; returns the number of skipped blocks."""
        self._has_loaded_shards = False
        steps, copies = [], []
        for p in members:
            shard = self._shards[p]
            local = shard.param
            flat = local.contiguous().view(-1)  # a copy where the parameter is not row-major in memory
            if flat.data_ptr() != local.data_ptr():
                copies.append((local, flat))
            grad = shard.grad.contiguous().view(-1)
            num_steps = int(self.state[p]["step"])
            steps.append(TensorStep(flat, grad, flatten_state(self._local_state(p)), self._layouts[p], num_steps))
        if self._meter is not None and self._meter.is_due(self.param_groups):
            sharding_groups = [self._shards[p].sharding_group for p in members]
            self._meter.measure(zip(steps, sharding_groups, strict=True), config, grad_scale)
        num_skipped = self._backend.step(steps, config, grad_scale)
        for local, flat in copies:
            local.copy_(flat.view(local.shape))
        for p in members:
            self.state[p]["step"] += 1
            # A kernel writes through a pointer; a backward pass that still needs the old values must notice.
            torch.autograd.graph.increment_version(self._shards[p].param)
        return num_skipped

    def _count_nonfinite(self, num_blocks: int) -> None:
        if num_blocks and not self._num_nonfinite_blocks:
            warnings.warn(
                f"MicroAdam skipped {num_blocks} blocks whose gradient or error feedback is not finite (NaN, Inf or "
                "above 2**60); their weights and state are unchanged. Further ones are only counted, in "
                "optimizer.num_nonfinite_blocks. If they keep coming, check the loss or clip the gradients.",
                stacklevel=5,  # past torch's wrappers of step(), to the training loop
            )
        self._num_nonfinite_blocks += num_blocks

    # ---------------------------------------------------------------- layout and state

    def _find_layouts(self, tensors: Iterable[Tensor]) -> dict[Tensor, StateLayout]:
        """Layouts of those tensors (all in the param groups) that have none yet; changes nothing."""
        wanted = {tensor for tensor in tensors if tensor not in self._layouts}
        layouts: dict[Tensor, StateLayout] = {}
        if not wanted:
            return layouts
        for group_index, group in enumerate(self.param_groups):
            config = None
            for position, tensor in enumerate(group["params"]):
                if tensor in wanted:
                    config = config or MicroAdamConfig.from_dict(group)
                    size = len(group["params"])
                    slot = Slot(tensor, group_index, position, size, self._constructed, self._exchange)
                    self._shards[tensor] = find_shard(slot)
                    layouts[tensor] = StateLayout(self._shards[tensor].spans, config)
        return layouts

    def _prepare(self, tensors: Sequence[Tensor]) -> bool:
        """Make state where there is none, unless something is not supported; returns whether there was none at all."""
        is_first_call = not any(self.state.get(p) for p in self._layouts)  # state may have been cleared
        for p in tensors:
            if not self.state.get(p):
                self._layouts.pop(p, None)
        layouts = self._find_layouts(tensors)
        for p in tensors:
            _ = self._shards[p].grad  # raises if it cannot be used
        for p, layout in layouts.items():
            self._backend.check(layout.config, p.device)
        for p, layout in layouts.items():
            self._set_state(p, layout, {"step": torch.zeros((), dtype=torch.int64), **allocate_state(layout, p.device)})
        return is_first_call

    def _is_probe(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a first call is made only to see the state: all gradients are zero, on all ranks that must agree."""
        # A rank that has nothing to step answers others that have.
        shards = [self._shards[p] for p in tensors] or list(self.shards().values())
        if not all(shard.may_be_probed for shard in shards):
            return False
        return not any_rank(any(bool(self._shards[p].grad.any()) for p in tensors), shards)

    def _require_unchanged(self, groups: Iterable[tuple[MicroAdamConfig, Sequence[Tensor]]]) -> None:
        """State is laid out for the settings and the shape it was made for."""
        for config, members in groups:
            for p in members:
                shard, made_for = self._shards[p], self._layouts[p].config
                for name in STRUCTURAL_SETTINGS:
                    if getattr(config, name) != getattr(made_for, name):
                        raise ConfigError(
                            f"{name}={getattr(config, name)!r}: the state of parameter {shard.name!r} was made with "
                            f"{getattr(made_for, name)!r}. It cannot change once state exists; set it back, or "
                            "construct a new optimizer."
                        )
                if tuple(shard.param.shape) != shard.local_shape:
                    raise UnsupportedLayoutError(
                        f"parameter {shard.name!r} has shape {tuple(shard.param.shape)} now, its state was made for "
                        f"{shard.local_shape}. Construct a new optimizer after changing a parameter's shape."
                    )

    def _set_state(self, p: Tensor, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        """Keep these flat state tensors and ``step`` as the state of ``p``."""
        wrap = self._shards[p].wrap
        shaped = shape_state(layout, state)
        self.state[p] = {name: tensor if name == "step" else wrap(tensor) for name, tensor in shaped.items()}
        self._layouts[p] = layout
        if self._exchange is not None:
            self._exchange.forget(p)

    def _local_state(self, p: Tensor) -> dict[str, Tensor]:
        """This rank's part of the state tensors of ``p``, without ``step``."""
        unwrap = self._shards[p].unwrap
        return {name: unwrap(self.state[p][name]) for name in self._layouts[p].tensors}

    def _saved_layout(self, p: Tensor) -> StateLayout:
        """What the state of ``p`` describes in a state dict."""
        return replace(self._layouts[p], spans=self._shards[p].saved_spans)

    # ---------------------------------------------------------------- state dict

    def state_dict(self) -> StateDict:
        """The state as torch's optimizers give it, and under ``"microadam"`` what each tensor's state describes.

        With that entry (see `checkpoint.format`) a checkpoint that was written for another sharding is recognized.
        Under FSDP1 there is a note in the place of the state, see `sharded_state`.
        """
        state_dict = super().state_dict()
        layouts = {}
        for index, p in enumerate(chain.from_iterable(group["params"] for group in self.param_groups)):
            if self.state.get(p) and self._shards[p].is_saved_apart:
                state_dict["state"][index] = {"step": self.state[p]["step"], APART_KEY: APART}
                if not p.numel():  # the ranks that hold a part of it know the step
                    del state_dict["state"][index]
            elif self.state.get(p):
                layouts[index] = self._saved_layout(p)
        state_dict[LAYOUT_KEY] = describe_layouts(layouts, *process_rank())
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict bit for bit; state belongs to parameters by position, whatever their keys.

        Raises:
            CheckpointMismatchError: The state does not fit. The optimizer is left as it was.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        groups, saved_state = state_dict_parts(state_dict)
        match_groups(groups, self.param_groups)
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        keys = chain.from_iterable(group["params"] for group in groups)
        loaded = {p: saved_state[key] for p, key in zip(tensors, keys, strict=True) if key in saved_state}
        if any(APART_KEY in state for state in loaded.values() if isinstance(state, Mapping)):
            self._require_loaded_apart(loaded)
            self._load_group_settings(groups)
            return

        layouts = {**self._layouts, **self._find_layouts(loaded)}
        # Tools that pass on "state" and "param_groups" only drop this entry.
        saved_layouts = read_layouts(state_dict[LAYOUT_KEY]) if LAYOUT_KEY in state_dict else {}
        for index, p in enumerate(tensors):
            if p not in loaded:
                continue
            name = f"{self._shards[p].name} of shape {tuple(p.shape)}"
            if index in saved_layouts:
                match_spans(saved_layouts[index], replace(layouts[p], spans=self._shards[p].saved_spans), name)
            match_names(loaded[p], layouts[p], name)
            unwrap = self._shards[p].unwrap
            local = {key: unwrap(x) if isinstance(x, Tensor) else x for key, x in loaded[p].items()}
            match_tensors(local, layouts[p], name)

        # The base class would cast every tensor to the parameter's dtype, which turns codes and indices into rubbish.
        copies = {p: self._copy_state(p, layouts[p], state) for p, state in loaded.items()}
        self._load_group_settings(groups)
        self.state.clear()
        self._layouts = {}
        for p, state in copies.items():
            self._set_state(p, layouts[p], state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_group_settings(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for group, saved in zip(self.param_groups, copy.deepcopy(groups), strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "param_names")})

    def _require_loaded_apart(self, loaded: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """A note in the place of the state is loaded in silence only right after the state itself."""
        same = all(int(self.state[p]["step"]) == int(loaded[p]["step"]) for p in loaded if self.state.get(p))
        if not (self._has_loaded_shards and same):
            raise CheckpointMismatchError(
                f"this state dict was saved under FSDP1 and holds no MicroAdam state (it was {APART}): call "
                "microadam_dist.load_sharded(optimizer, folder) with the folder of the same step, and load this state "
                "dict after it or not at all."
            )

    def _copy_state(self, p: Tensor, layout: StateLayout, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of saved state tensors, flat, on the parameter's device, and ``step``."""
        local = {name: self._shards[p].unwrap(saved[name]) for name in layout.tensors}
        copies = {name: tensor.to(p.device, copy=True).contiguous().view(-1) for name, tensor in local.items()}
        return {"step": saved["step"].to("cpu", copy=True), **copies}

    # ---------------------------------------------------------------- shards, for checkpoint adapters

    def layouts(self) -> dict[Tensor, StateLayout]:
        """What each tensor in the param groups holds, whether it has state yet or not."""
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        found = self._find_layouts(tensors)
        return {p: self._layouts.get(p) or found[p] for p in tensors}

    def shards(self) -> dict[Tensor, Shard]:
        """How the data of each tensor in the param groups is reached."""
        return {p: self._shards[p] for p in self.layouts()}

    def flat_state(self, p: Tensor) -> dict[str, Tensor] | None:
        """This rank's state of a tensor as `layouts` lays it out, and ``step``; None when it has none."""
        return {"step": self.state[p]["step"], **flatten_state(self._local_state(p))} if self.state.get(p) else None

    def load_shards(self, states: Mapping[Tensor, Mapping[str, Tensor] | None]) -> None:
        """Replace the state of tensors by state laid out as `layouts` says; None takes it away."""
        layouts = self.layouts()
        self._has_loaded_shards = True
        for p, state in states.items():
            if state is None:
                self._layouts.pop(p, None)
                self.state.pop(p, None)
            else:
                moved = {name: tensor if name == "step" else tensor.to(p.device) for name, tensor in state.items()}
                self._set_state(p, layouts[p], moved)

    # ---------------------------------------------------------------- pickling

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_backend",
            "_constructed",
            "_shards",
            "_layouts",
            "_num_nonfinite_blocks",
            "_has_loaded_shards",
            "_exchange",
            "_meter",
            "sparse_allgather",
            "exchanged_bytes",
        )
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}


def _with_numbers(settings: Mapping[str, Any], config: MicroAdamConfig) -> dict[str, Any]:
    """The settings as numbers: what came as a string or from NumPy cannot be scheduled, or compared in a checkpoint."""
    return {
        key: getattr(config, key) if key in SETTING_NAMES and not isinstance(value, Tensor) else value
        for key, value in settings.items()
    }
