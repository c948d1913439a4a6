"""MicroAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .backends.base import CapturableBackend, DeviceInputs, TensorStep, select_backend
from .checkpoint.format import APART, APART_KEY, LAYOUT_KEY, describe_layouts, read_layouts
from .checkpoint.match import match_groups, match_names, match_spans, match_tensors, state_dict_parts
from .config import SETTING_NAMES, STRUCTURAL_SETTINGS, MicroAdamConfig, reject_unknown_settings
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
from .nonfinite import NonfiniteCounter
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
        capturable: Count the steps on the GPU and read ``lr`` (if it is a tensor there) and what GradScaler found there
            too, so that a step waits for nothing and can be captured in a CUDA graph. Needs ``backend="cuda"``.

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
        capturable: bool = False,
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
        self._exchange = row_exchange(shard_state, weight_exchange, self.exchanged_bytes)
        self._backend = select_backend("cuda" if capturable else backend)
        self._constructed: list[list[NamedParameter]] = []
        self._shards: dict[Tensor, Shard] = {}  # how the data of a tensor is reached; found with its layout
        self._layouts: dict[Tensor, StateLayout] = {}
        self._nonfinite = NonfiniteCounter()
        self._has_loaded_shards = False  # and has not stepped since
        self.loads_shards_later = False  # set by who calls load_sharded after load_state_dict
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
        return self._nonfinite.total

    @property
    def shards_state(self) -> bool:
        """Whether the state of replicated parameters is shared by several ranks (``shard_state``)."""
        return self._exchange is not None

    @property
    def is_saved_apart(self) -> bool:
        """Whether `save_sharded` is needed beside what frameworks save: under FSDP1, and with ``shard_state``.

        They save a state dict without room for the state, and one of one rank.
        """
        return self.shards_state or any(shard.is_saved_apart for shard in self.shards().values())

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
        if not self.capturable and found_inf is not None and float(found_inf):  # a plain 0 when there is no gradient
            return loss
        groups = [
            (self._config(group), [p for p in group["params"] if p.grad is not None]) for group in self.param_groups
        ]
        tensors = [p for _, members in groups for p in members]
        if self._prepare(tensors) and self._is_probe(tensors):
            return loss
        self._require_unchanged(groups)

        grad_scale = 1.0 if loss_scale is None or self.capturable else 1.0 / float(loss_scale)
        skipped = []
        for group, (config, members) in zip(self.param_groups, groups, strict=True):
            inputs = _device_inputs(group, loss_scale, found_inf) if self.capturable else grad_scale
            skipped.append(self._step_group(members, config, inputs))
        self._nonfinite.add(skipped)
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
        self._prepare([param])
        self._require_unchanged([(config, [param])])
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
        locals_ = [shard.param for shard in shards]
        # Copies where a parameter is not row-major in memory.
        flats = [local.contiguous().view(-1) for local in locals_]
        steps = [
            TensorStep(
                flat,
                shard.grad.contiguous().view(-1),
                state,
                self._layouts[p],
                0 if self.capturable else int(state["step"]),
                counter=state["step"],
            )
            for p, shard, flat, state in zip(members, shards, flats, map(self._unwrapped_state, members), strict=True)
        ]
        if isinstance(inputs, DeviceInputs):
            assert isinstance(self._backend, CapturableBackend)
            num_skipped = self._backend.step_on_device(steps, config, inputs)
        else:
            num_skipped = self._backend.step(steps, config, inputs)
        for p, local, flat in zip(members, locals_, flats, strict=True):
            if flat.data_ptr() != local.data_ptr():
                local.copy_(flat.view(local.shape))
            if not self.capturable:
                self.state[p]["step"] += 1
        # A kernel writes through a pointer; a backward pass that still needs the old values must notice.
        torch.autograd.graph.increment_version(locals_)
        return num_skipped

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

    def _require_unchanged(self, groups: Iterable[tuple[MicroAdamConfig, Sequence[Tensor]]]) -> None:
        """State is laid out for the settings and the shape it was made for."""
        for config, members in groups:
            unchanged = None
            for p in members:
                shard, made_for = self._shards[p], self._layouts[p].config
                for name in STRUCTURAL_SETTINGS if made_for is not unchanged else ():
                    if getattr(config, name) != getattr(made_for, name):
                        raise ConfigError(
                            f"{name}={getattr(config, name)!r}: the state of parameter {shard.name!r} was made with "
                            f"{getattr(made_for, name)!r}. It cannot change once state exists; set it back, or "
                            "construct a new optimizer."
                        )
                unchanged = made_for
                if tuple(shard.param.shape) != shard.local_shape:
                    raise UnsupportedLayoutError(
                        f"parameter {shard.name!r} has shape {tuple(shard.param.shape)} now, its state was made for "
                        f"{shard.local_shape}. Construct a new optimizer after changing a parameter's shape."
                    )

    def _step_device(self, p: Tensor) -> torch.device:
        """Where the steps of ``p`` are counted."""
        return p.device if self.capturable else torch.device("cpu")

    def _set_state(self, p: Tensor, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        """Keep these flat state tensors and ``step`` as the state of ``p``."""
        wrap = self._shards[p].wrap
        shaped = shape_state(layout, state)
        self.state[p] = {name: tensor if name == "step" else wrap(tensor) for name, tensor in shaped.items()}
        self._layouts[p] = layout
        if self._exchange is not None:
            self._exchange.forget(p)

    def _unwrapped_state(self, p: Tensor) -> Mapping[str, Tensor]:
        """This rank's part of the state tensors of ``p``, and ``step``."""
        state: dict[str, Tensor] = self.state[p]
        if type(self._shards[p]).unwrap is Shard.unwrap:  # a dictionary a tensor and step is work for the collector
            return state
        return {"step": state["step"], **self._local_state(p)}

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
        layouts = {**self._layouts, **self._find_layouts(loaded)}
        if any(self._is_elsewhere(p, state) for p, state in loaded.items()):
            self._require_loaded_apart(loaded)
            self._load_group_settings(groups)
            return
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

    def _is_elsewhere(self, p: Tensor, saved: Any) -> bool:
        """Whether what was saved is a note in the place of the state, or the part of another rank."""
        if not isinstance(saved, Mapping):
            return False
        return APART_KEY in saved or any(self._shards[p].is_other_rank_part(state) for state in saved.values())

    def _require_loaded_apart(self, loaded: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Such a state dict is loaded in silence only together with the state itself."""
        same = all(int(self.state[p]["step"]) == int(loaded[p]["step"]) for p in loaded if self.state.get(p))
        if not (self.loads_shards_later or (self._has_loaded_shards and same)):
            raise CheckpointMismatchError(
                "this state dict holds no MicroAdam state for this rank: it was saved under FSDP1, or by another rank. "
                f"The state was {APART}: call microadam_dist.load_sharded(optimizer, folder) with the folder of the "
                "same step, and load this state dict after it or not at all."
            )

    def _copy_state(self, p: Tensor, layout: StateLayout, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of saved state tensors, flat, on the parameter's device, and ``step``."""
        local = {name: self._shards[p].unwrap(saved[name]) for name in layout.tensors}
        copies = {name: tensor.to(p.device, copy=True).contiguous().view(-1) for name, tensor in local.items()}
        return {"step": saved["step"].to(self._step_device(p), copy=True), **copies}

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
                moved = {name: tensor.to(p.device) for name, tensor in state.items() if name != "step"}
                self._set_state(p, layouts[p], {"step": state["step"].to(self._step_device(p)), **moved})

    # ---------------------------------------------------------------- pickling

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_backend",
            "_constructed",
            "_shards",
            "_layouts",
            "_nonfinite",
            "_has_loaded_shards",
            "loads_shards_later",
            "_exchange",
            "sparse_allgather",
            "capturable",
            "exchanged_bytes",
        )
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}


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
