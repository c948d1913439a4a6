"""MicroAdam as a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .backends.base import TensorStep, select_backend
from .checkpoint.format import LAYOUT_KEY, describe_layouts, read_layouts
from .config import STRUCTURAL_SETTINGS, MicroAdamConfig, reject_unknown_settings
from .engines.base import NamedParameter, Shard, Slot, any_rank, engines, find_shard, process_rank
from .errors import CheckpointMismatchError, ConfigError
from .layout import DENSE_TENSORS, StateLayout
from .state import allocate_state, flatten_state, shape_state, state_specs

_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StateBytes(NamedTuple):
    """What this rank has allocated: parameters and bytes of state on the Top-K path and on the dense (AdamW) path."""

    sparse_numel: int
    sparse_bytes: int
    dense_numel: int
    dense_bytes: int


@dataclass
class ExchangedBytes:
    """What this rank has handed to the collectives that pass its new weights on, so far.

    Counted with ``sparse_allgather`` only; every collective counts once, whatever the number of receivers.

    Attributes:
        sent: With padding, headers and dense gathers.
        dense: What it would have been with dense gathers alone.
    """

    sent: int = 0
    dense: int = 0


class MicroAdam(Optimizer):
    """Adam with about one byte of state a parameter.

    Keeps a 4-bit error feedback and a window of the last sparse Top-K gradients, from which the moments are recomputed
    at every step. Vectors and small matrices (norms, biases) take AdamW with fp32 moments.

    Args:
        params: Parameters, named parameters or param groups; fp32, bf16 or fp16. Every setting but the last two may be
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
        MicroAdamConfig.from_dict(defaults)
        if not isinstance(sparse_allgather, bool):
            raise ConfigError(f"sparse_allgather={sparse_allgather!r}: expected true or false.")
        self.sparse_allgather = sparse_allgather
        self.exchanged_bytes = ExchangedBytes()
        self._backend = select_backend(backend)
        self._constructed: list[list[NamedParameter]] = []
        self._shards: dict[Tensor, Shard] = {}  # how the data of a tensor is reached; found with its layout
        self._layouts: dict[Tensor, StateLayout] = {}
        self._num_nonfinite_blocks = 0
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
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        first = sum(len(members) for members in self._constructed)
        names = group.get("param_names") or [str(first + i) for i in range(len(group["params"]))]
        try:
            for name, param in zip(names, group["params"], strict=True):
                if param.dtype not in _PARAM_DTYPES:
                    raise ConfigError(f"parameter {name!r} is {param.dtype}; MicroAdam trains fp32, bf16, fp16.")
                self._backend.check(config, param.device)
        except Exception:
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

    def state_bytes(self) -> StateBytes:
        """State this rank holds now, as allocated (step counters not counted)."""
        totals = [0, 0, 0, 0]
        for tensor, layout in self._layouts.items():
            nbytes = {name: state.nbytes for name, state in self._local_state(tensor).items()}
            dense = sum(nbytes.get(name, 0) for name in DENSE_TENSORS)
            parts = (layout.sparse_numel, sum(nbytes.values()) - dense, layout.dense_numel, dense)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        return StateBytes(*totals)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; the gradients are read, never overwritten.

        The very first call with nothing but zero gradients only allocates the state: DeepSpeed and
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
        if found_inf is not None and found_inf.item():
            return loss
        grad_scale = 1.0 if loss_scale is None else 1.0 / loss_scale.item()

        groups = [
            (MicroAdamConfig.from_dict(group), [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        tensors = [p for _, members in groups for p in members]
        is_first_call = not self._layouts
        grads = self._create_missing_state(tensors)
        if is_first_call and not any_rank(any(bool(grad.any()) for grad in grads), [self._shards[p] for p in tensors]):
            return loss

        num_skipped = 0
        for config, members in groups:
            num_skipped += self._step_group(members, config, grad_scale)
        self._count_nonfinite(num_skipped)
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
        self._create_missing_state([param])
        self._count_nonfinite(self._step_group([param], config, grad_scale=1.0))

    def _step_group(self, members: Sequence[Tensor], config: MicroAdamConfig, grad_scale: float) -> int:
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
                stacklevel=3,
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
                    slot = Slot(tensor, group_index, position, len(group["params"]), self._constructed)
                    self._shards[tensor] = find_shard(slot)
                    layouts[tensor] = StateLayout(self._shards[tensor].spans, config)
        return layouts

    def _create_missing_state(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Make state where there is none, unless something is not supported; returns the local gradients."""
        layouts = self._find_layouts(tensors)
        grads = [self._shards[p].grad for p in tensors]
        for p, layout in layouts.items():
            self._backend.check(layout.config, p.device)
        for p, layout in layouts.items():
            self._set_state(p, layout, {"step": torch.zeros((), dtype=torch.int64), **allocate_state(layout, p.device)})
        return grads

    def _set_state(self, p: Tensor, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        """Keep these flat state tensors and ``step`` as the state of ``p``."""
        wrap = self._shards[p].wrap
        shaped = shape_state(layout, state)
        self.state[p] = {name: tensor if name == "step" else wrap(tensor) for name, tensor in shaped.items()}
        self._layouts[p] = layout

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
        """
        state_dict = super().state_dict()
        tensors = chain.from_iterable(group["params"] for group in self.param_groups)
        layouts = {index: self._saved_layout(p) for index, p in enumerate(tensors) if p in self._layouts}
        state_dict[LAYOUT_KEY] = describe_layouts(layouts, *process_rank())
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict bit for bit; state belongs to parameters by position, whatever their keys.

        Raises:
            CheckpointMismatchError: The state does not fit. The optimizer is left as it was.
        """
        groups, saved_state = state_dict["param_groups"], state_dict["state"]
        tensors = self._match_groups(groups)
        keys = list(chain.from_iterable(group["params"] for group in groups))
        position = {key: index for index, key in enumerate(keys)}
        loaded = {tensors[position[key]]: state for key, state in saved_state.items() if key in position}

        layouts = {**self._layouts, **self._find_layouts(loaded)}
        if LAYOUT_KEY in state_dict:  # tools that pass on "state" and "param_groups" only drop it
            saved_layouts = read_layouts(state_dict[LAYOUT_KEY])
            for index, layout in saved_layouts.items():
                if index < len(tensors) and tensors[index] in loaded:
                    p = tensors[index]
                    _match_spans(layout, replace(layouts[p], spans=self._shards[p].saved_spans), index)
        for key, index in position.items():
            if key in saved_state:
                p = tensors[index]
                describe = f"parameter {index} of shape {tuple(p.shape)}"
                _match_state(saved_state[key], layouts[p], self._shards[p], describe)

        # The base class would cast every tensor to the parameter's dtype, which turns codes and indices into rubbish:
        # it gets the groups alone.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._layouts = {}
        for p, state in loaded.items():
            local = {name: self._shards[p].unwrap(state[name]) for name in layouts[p].tensors}
            copies = {name: tensor.to(p.device, copy=True).contiguous().view(-1) for name, tensor in local.items()}
            self._set_state(p, layouts[p], {"step": state["step"].to("cpu", copy=True), **copies})

    def _match_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """The tensors of all groups in order, after a check that the saved groups have the same form and settings."""
        saved_sizes = [len(group["params"]) for group in groups]
        sizes = [len(group["params"]) for group in self.param_groups]
        if saved_sizes != sizes:
            raise CheckpointMismatchError(
                f"the checkpoint has param groups of {saved_sizes} parameters, this optimizer of {sizes}. Build the "
                "optimizer with the same groups as when the checkpoint was written."
            )
        for index, (saved, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            for name in STRUCTURAL_SETTINGS:
                if name not in saved:
                    raise CheckpointMismatchError(
                        f"param group {index} of the checkpoint has no {name!r}: it was not written by MicroAdam."
                    )
                if saved[name] != group[name]:
                    raise CheckpointMismatchError(
                        f"param group {index} of the checkpoint has {name}={saved[name]}, this optimizer "
                        f"{group[name]}. State cannot be converted; construct the optimizer with {name}={saved[name]}."
                    )
        return list(chain.from_iterable(group["params"] for group in self.param_groups))

    # ---------------------------------------------------------------- shards, for checkpoint adapters

    def layouts(self) -> dict[Tensor, StateLayout]:
        """What each tensor in the param groups holds, whether it has state yet or not."""
        tensors = list(chain.from_iterable(group["params"] for group in self.param_groups))
        found = self._find_layouts(tensors)
        return {p: self._layouts.get(p) or found[p] for p in tensors}

    def shards(self) -> dict[Tensor, Shard]:
        """How the data of each tensor in the param groups is reached."""
        return {p: self._shards[p] for p in self.layouts()}

    def load_shards(self, states: Mapping[Tensor, Mapping[str, Tensor] | None]) -> None:
        """Replace the state of tensors by state laid out as `layouts` says; None takes it away."""
        layouts = self.layouts()
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
            "sparse_allgather",
            "exchanged_bytes",
        )
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}


def _match_state(state: Mapping[str, Any], layout: StateLayout, shard: Shard, describe: str) -> None:
    """Refuse state whose tensors are not exactly those of the layout, distributed like the parameter."""
    expected = {"step", *layout.tensors}
    if set(state) != expected:
        raise CheckpointMismatchError(
            f"the checkpoint's state of {describe} has {sorted(state)}, expected {sorted(expected)}. "
            "It was written by another optimizer or for a parameter of another shape."
        )
    specs = {name: (dtype, layout.shapes[name]) for name, (dtype, _) in state_specs(layout).items()}
    for name, (dtype, shape) in {"step": (torch.int64, ()), **specs}.items():
        got = shard.unwrap(state[name]) if isinstance(state[name], Tensor) else state[name]
        if not isinstance(got, Tensor) or got.dtype != dtype or got.shape != shape:
            found = f"{got.dtype} {tuple(got.shape)}" if isinstance(got, Tensor) else repr(got)
            raise CheckpointMismatchError(
                f"the checkpoint's {name!r} of {describe} is {found}, expected {dtype} {shape}. "
                "It was written for another model, sharding or settings; resume with the same ones."
            )


def _match_spans(saved: StateLayout, layout: StateLayout, index: int) -> None:
    """Refuse state of another shard of the parameter; names are not compared, they depend on how it was built."""
    got, expected = (
        [(span.global_shape, span.start, span.numel, span.offset) for span in side.spans] for side in (saved, layout)
    )
    if got != expected:
        pairs = zip(got, expected, strict=False)
        theirs, ours = next((pair for pair in pairs if pair[0] != pair[1]), (got, expected))
        raise CheckpointMismatchError(
            f"the checkpoint's state of parameter {index} describes another shard: (shape, start, length, offset) "
            f"{theirs}, here {ours}. It was written with another number of ranks, another sharding or for another "
            "model. Under DeepSpeed, microadam_dist.deepspeed.load_checkpoint loads it on any number of ranks."
        )
