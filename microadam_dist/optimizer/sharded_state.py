"""What the tensors of an optimizer hold, and their state: found, kept, saved and loaded."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from ..arithmetic.state import OWN_NAMES, allocate_state, flatten_state, shape_state
from ..checkpoint.format import APART, APART_KEY, LAYOUT_KEY, describe_layouts, read_layouts
from ..checkpoint.match import (
    Groups,
    match_description,
    match_groups,
    match_memory,
    match_names,
    match_spans,
    match_tensors,
    read_step,
    state_dict_parts,
)
from ..checkpoint.training import SavedStates
from ..config import LATER_SETTINGS, STRUCTURAL_SETTINGS, MicroAdamConfig, structural_difference
from ..engines.base import Place, Shard, WeightExchange
from ..engines.collectives import process_rank
from ..engines.dtensors import describe
from ..engines.find import find_shard
from ..engines.names import ParameterNames
from ..errors import CheckpointMismatchError, ConfigError, UnsupportedLayoutError
from ..layout import DENSE_TENSORS, StateLayout
from .checked import CheckedState, is_others, is_ours

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StateBytes(NamedTuple):
    """What this rank has allocated: parameters and bytes of state on the Top-K path and on the dense (AdamW) path."""

    sparse_numel: int
    sparse_bytes: int
    dense_numel: int
    dense_bytes: int


class Part(NamedTuple):
    """What is known of a tensor that is about to be stepped.

    Attributes:
        shard: How its data is reached.
        layout: Of its state.
        param, grad: This rank's data, as ``shard`` gives them.
    """

    shard: Shard
    layout: StateLayout
    param: Tensor
    grad: Tensor


class _Fitting(NamedTuple):
    """The parts of a state dict that fits, by tensor; no state where it only says that this is elsewhere."""

    groups: Groups
    state: dict[Tensor, Any] | None
    layouts: dict[Tensor, StateLayout]


class ShardedState:
    """State of parameters that an engine may have sharded.

    The tensors are in the ``state`` of the optimizer, where torch and engines look for them; here is what they mean.

    Args:
        exchange: How ranks pass new weights on that share the state of replicated parameters.
        counts_on_device: Whether steps are counted where the parameters are.

    Attributes:
        names: What the parameters are called.
        loads_shards_later: Whether `load_shards` follows `load_state_dict`; set by who will call it.
    """

    def __init__(self, exchange: WeightExchange | None, *, counts_on_device: bool) -> None:
        self.names = ParameterNames()
        self.loads_shards_later = False
        self._shards: dict[Tensor, Shard] = {}  # how the data of a tensor is reached; found with its layout
        self._layouts: dict[Tensor, StateLayout] = {}
        self._exchange = exchange
        self._counts_on_device = counts_on_device
        self._has_loaded_shards = False  # and has not stepped since

    def bind(self, optimizer: Optimizer) -> None:
        """Whose state it is; weakly, so that its memory is free as soon as the optimizer is dropped."""
        self._optimizer = weakref.ref(optimizer)
        self._checked: dict[int, CheckedState] = {}  # by id of the tensor, which these keep: torch hashes slowly

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_optimizer", "_checked")}

    @property
    def _owner(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # it owns this
        return optimizer

    @property
    def _state(self) -> dict[Tensor, Any]:
        return self._owner.state

    @property
    def _tensors(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self._owner.param_groups))

    @property
    def is_saved_apart(self) -> bool:
        """Whether `save_sharded` is needed beside what frameworks save: under FSDP1, and with ``shard_state``.

        They save a state dict without room for the state, and one of one rank.
        """
        return self._exchange is not None or any(shard.is_saved_apart for shard in self.shards().values())

    def state_bytes(self) -> StateBytes:
        """See `MicroAdam.state_bytes`."""
        totals = [0, 0, 0, 0]
        for tensor, layout in self._layouts.items():
            if not self._has_state(tensor):
                continue
            local = self.local(tensor)
            nbytes = {name: local[name].nbytes for name in layout.tensors}
            dense = sum(nbytes.get(name, 0) for name in DENSE_TENSORS)
            parts = (layout.sparse_numel, sum(nbytes.values()) - dense, layout.dense_numel, dense)
            totals = [total + part for total, part in zip(totals, parts, strict=True)]
        if self._exchange is not None:
            totals[1] += self._exchange.replica_bytes
        return StateBytes(*totals)

    # ---------------------------------------------------------------- for a step

    @property
    def is_empty(self) -> bool:
        """Whether no parameter has state; it may have been cleared."""
        return not any(is_ours(state) for state in self._state.values())

    def find_new(self, tensors: Iterable[Tensor]) -> dict[Tensor, StateLayout]:
        """Layouts for those of the tensors that have no state, or other state tensors than when they were checked.

        Raises:
            CheckpointMismatchError: State that others have put there does not fit. Nothing has been changed.
        """
        states, checked = self._state, self._checked
        new = [p for p in tensors if (known := checked.get(id(p))) is None or not known.is_in(states.get(p))]
        if not new:
            return {}
        for p in new:
            if not self._has_state(p):
                self._layouts.pop(p, None)
        found = self._find_layouts(new)
        layouts = {p: found.get(p) or self._layouts[p] for p in new}
        for p, layout in layouts.items():
            if self._has_state(p):
                local = self._match(p, layout, self._state[p])
                match_memory(local, layout, p.device, self._title(p))
        return layouts

    def require_unchanged(
        self, members: Iterable[Tensor], config: MicroAdamConfig, new: Mapping[Tensor, StateLayout]
    ) -> list[Part]:
        """The gradients can be used, and the settings and the shapes are those that state is laid out for.

        Args:
            members: Tensors of one group, with gradients.
            config: The settings of the group.
            new: What `find_new` has found for these tensors and others.

        Raises:
            ConfigError: A structural setting has changed.
            ConfigError: The parameter has a dtype that is not supported, or not with these settings.
            UnsupportedLayoutError: A shape has changed, or a gradient cannot be used.
        """
        parts, checked, structure = [], self._checked, config.structural
        for p in members:
            if new and p in new:
                shard, layout = self._shards[p], new[p]
            else:
                known = checked[id(p)]
                shard, layout = known.shard, known.layout
            if layout.config.structural != structure:
                self._require_structure(p, structure, layout.config)
            param = shard.param
            if (dtype := param.dtype) not in PARAM_DTYPES:
                raise ConfigError(
                    f"parameter {shard.name!r} is {dtype} now, MicroAdam trains fp32, bf16, fp16: convert it."
                )
            if dtype is torch.float16 and config.rounding == "stochastic":
                raise ConfigError(
                    f"rounding='stochastic': parameter {shard.name!r} is fp16, and this rounding is defined for bf16 "
                    "only, whose numbers are the upper halves of fp32 numbers. Use rounding='auto' or 'nearest'."
                )
            if param.shape != shard.local_shape:
                raise UnsupportedLayoutError(
                    f"parameter {shard.name!r} has shape {tuple(param.shape)} now, its state was made for "
                    f"{shard.local_shape}. Construct a new optimizer after changing a parameter's shape."
                )
            parts.append(Part(shard, layout, param, shard.grad))  # whose gradient raises if it cannot be used
        return parts

    def require_one_structure(self, new: Mapping[Tensor, StateLayout]) -> None:
        """In groups that get new state, the state that is there, gradient or not, was made with the same settings.

        Raises:
            ConfigError: A structural setting has changed.
        """
        for group in self._owner.param_groups if new else ():
            if new.keys().isdisjoint(group["params"]):
                continue
            structure = MicroAdamConfig.from_dict({name: group[name] for name in STRUCTURAL_SETTINGS}).structural
            for p in group["params"]:
                if p not in new and p in self._layouts and self._has_state(p):
                    self._require_structure(p, structure, self._layouts[p].config)

    def _require_structure(self, p: Tensor, structure: Mapping[str, Any], made_for: MicroAdamConfig) -> None:
        if name := structural_difference(structure, made_for.structural):
            raise ConfigError(
                f"{name}={structure[name]!r}: the state of parameter {self._shards[p].name!r} was made with "
                f"{getattr(made_for, name)!r}. It cannot change once state exists; set it back, or construct a new "
                "optimizer."
            )

    def accept(self, layouts: Mapping[Tensor, StateLayout]) -> None:
        """Zero state for tensors that `find_new` has found to have none; the state that others have put there stays."""
        for p, layout in layouts.items():
            if self._has_state(p):
                step = self._state[p]["step"]
                if type(step) is not Tensor or (step.dtype, step.device) != (torch.int64, self._step_device(p)):
                    self._state[p]["step"] = self._step_tensor(p, read_step(step, self._title(p)))
                self._keep(p, layout)
            else:
                self._set_state(p, layout, {"step": self._step_tensor(p, 0), **allocate_state(layout, p.device)})

    def shard(self, p: Tensor) -> Shard:
        """How the data of a tensor that has a layout is reached."""
        return self._shards[p]

    def layout(self, p: Tensor) -> StateLayout:
        """What a tensor that has state holds."""
        return self._layouts[p]

    def local(self, p: Tensor) -> Mapping[str, Tensor]:
        """This rank's part of the state tensors of ``p``, and ``step``; not copies."""
        state: dict[str, Tensor] = self._state[p]
        shard = self._shards[p]
        if shard.has_plain_state:  # a dictionary per tensor and step is work for the collector
            return state
        return {"step": state["step"], **{name: shard.unwrap(state[name]) for name in self._layouts[p].tensors}}

    def states(self, parts: Iterable[Part]) -> list[Mapping[str, Tensor]]:
        """The same of several tensors."""
        states = self._state
        return [
            states[part.shard.tensor] if part.shard.has_plain_state else self.local(part.shard.tensor) for part in parts
        ]

    def note_step(self) -> None:
        """The state is about to change."""
        self._has_loaded_shards = False

    # ---------------------------------------------------------------- shards, for checkpoint adapters

    def layouts(self) -> dict[Tensor, StateLayout]:
        """What each tensor in the param groups holds, whether it has state yet or not."""
        tensors = self._tensors
        found = self._find_layouts(tensors)
        return {p: self._layouts.get(p) or found[p] for p in tensors}

    def shards(self) -> dict[Tensor, Shard]:
        """How the data of each tensor in the param groups is reached."""
        return {p: self._shards[p] for p in self.layouts()}

    def flat_state(self, p: Tensor) -> dict[str, Tensor] | None:
        """This rank's state of a tensor as `layouts` lays it out, and ``step``; None when it has none."""
        return self.made_state(p) if self._has_state(p) else None

    def made_state(self, p: Tensor) -> dict[str, Tensor]:
        """The same, of zeros when it had none."""
        self.accept(self.find_new([p]))
        local = self.local(p)
        return flatten_state({name: local[name] for name in ("step", *self._layouts[p].tensors)})

    def fitting_shards(self, read: SavedStates) -> dict[Tensor, dict[str, Tensor] | None]:
        """State for `load_shards`, of every tensor in the param groups.

        Raises:
            CheckpointMismatchError: It does not fit.
        """
        layouts = self.layouts()
        states = dict(zip(layouts, read(list(layouts.values())), strict=True))
        for p, state in states.items():
            if state is not None:
                match_tensors(shape_state(layouts[p], state), layouts[p], self._title(p))
        return states

    def load_shards(self, states: Mapping[Tensor, Mapping[str, Tensor] | None]) -> None:
        """Replace the state of tensors by state laid out as `layouts` says; None takes it away."""
        layouts = self.layouts()
        self._has_loaded_shards = True
        for p, state in states.items():
            if state is None:
                self._layouts.pop(p, None)
                self._state.pop(p, None)
            else:
                moved = {name: tensor.to(p.device) for name, tensor in state.items() if name != "step"}
                self._set_state(p, layouts[p], {"step": state["step"].to(self._step_device(p)), **moved})

    # ---------------------------------------------------------------- state dict

    def describe(self, state_dict: StateDict) -> None:
        """In place: what torch's optimizers save also says what each tensor's state describes, under ``"microadam"``.

        With that entry (see `checkpoint.format`) a checkpoint that was written for another sharding is recognized.
        Under FSDP1 there is a note in the place of the state, see `sharded_files`.
        """
        layouts = {}
        with_state = {index: p for index, p in enumerate(self._tensors) if self._has_state(p)}
        found = self._find_layouts(with_state.values())
        for index, p in with_state.items():
            if not self._shards[p].is_saved_apart:
                layouts[index] = self._saved_layout(p, found.get(p) or self._layouts[p])
            elif p.numel():
                state_dict["state"][index] = {"step": self._state[p]["step"], APART_KEY: APART}
            else:  # the ranks that hold a part of it know the step
                del state_dict["state"][index]
        state_dict[LAYOUT_KEY] = describe_layouts(layouts, *process_rank())

    def check(self, state_dict: Mapping[str, Any]) -> _Fitting:
        """What `load` would load.

        Raises:
            CheckpointMismatchError: The state does not fit.
        """
        groups, saved_state = state_dict_parts(state_dict)
        match_groups(groups, self._owner.param_groups)
        tensors = self._tensors
        keys = chain.from_iterable(group["params"] for group in groups)
        loaded = {p: saved_state[key] for p, key in zip(tensors, keys, strict=True) if key in saved_state}
        layouts = {**self._layouts, **self._find_layouts(loaded)}
        elsewhere = (
            f"of {self._shards[p].name!r} {what}" for p, s in loaded.items() if (what := self._elsewhere(p, s))
        )
        if what := next(elsewhere, None):
            self._require_loaded_apart(loaded, what)
            return _Fitting(groups, None, layouts)
        # Tools that pass on "state" and "param_groups" only drop this entry.
        saved_layouts = read_layouts(state_dict[LAYOUT_KEY]) if LAYOUT_KEY in state_dict else {}
        match_description(state_dict, saved_layouts)
        for index, p in enumerate(tensors):
            if p not in loaded:
                continue
            if index in saved_layouts:
                match_spans(saved_layouts[index], self._saved_layout(p, layouts[p]), self._title(p))
            elif is_others(loaded[p]):
                continue
            self._match(p, layouts[p], loaded[p])
        return _Fitting(groups, loaded, layouts)

    @torch.no_grad()
    def load(self, state_dict: StateDict) -> None:
        """Load a state dict bit for bit; of one with only a note where the state is, the settings of the groups.

        Raises:
            CheckpointMismatchError: The state does not fit. Nothing has been changed.
        """
        groups, loaded, layouts = self.check(state_dict)
        if loaded is None:
            self.load_group_settings(groups)
            return
        # The base class would cast every tensor to the parameter's dtype, which turns codes and indices into rubbish.
        copies = {p: self._copy_state(p, layouts[p], state) for p, state in loaded.items()}
        self.load_group_settings(groups)
        self._state.clear()
        self._layouts = {}
        for p, state in copies.items():
            if is_ours(state):
                self._set_state(p, layouts[p], state)
            else:
                self._state[p] = state

    def load_group_settings(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take over what saved param groups say beside their parameters, and what older versions did."""
        for group, saved in zip(self._owner.param_groups, copy.deepcopy(groups), strict=True):
            # Structural ones are those that the state was checked with.
            later = {name: value for name, value in LATER_SETTINGS.items() if name not in STRUCTURAL_SETTINGS}
            group.update({key: value for key, value in {**later, **saved}.items() if key != "params"})

    def _elsewhere(self, p: Tensor, saved: Any) -> str | None:
        """What was saved in the place of the state, if that is a note or the part of another rank."""
        if not isinstance(saved, Mapping):
            return None
        if APART_KEY in saved:
            return "a note"
        return next((describe(state) for state in saved.values() if self._shards[p].is_other_part(state)), None)

    def _require_loaded_apart(self, loaded: Mapping[Tensor, Mapping[str, Any]], what: str) -> None:
        """Such a state dict is loaded in silence only together with the state itself."""
        same = all(int(self._state[p]["step"]) == int(loaded[p]["step"]) for p in loaded if self._state.get(p))
        if not (self.loads_shards_later or (self._has_loaded_shards and same)):
            raise CheckpointMismatchError(
                f"this state dict holds no MicroAdam state for this rank, {what}: it was saved under FSDP1, by another "
                f"rank, or by ranks that share the state in another way. What was {APART} is for any ranks: call "
                "microadam_dist.load_sharded(optimizer, folder) with the folder of the same step, and load this state "
                "dict after it or not at all. Of FSDP2 load what torch.distributed.checkpoint has saved; it reshards."
            )

    def _copy_state(self, p: Tensor, layout: StateLayout, saved: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of saved state tensors, flat, on the parameter's device, ``step``, and what others saved."""
        others = {
            name: x.to(p.device, copy=True) if isinstance(x, Tensor) else copy.deepcopy(x)
            for name, x in saved.items()
            if name not in OWN_NAMES
        }
        if not is_ours(saved):
            return others
        local = {name: self._shards[p].unwrap(saved[name]) for name in layout.tensors}
        copies = {name: tensor.to(p.device, copy=True).contiguous().view(-1) for name, tensor in local.items()}
        return {"step": self._step_tensor(p, read_step(saved["step"], self._title(p))), **copies, **others}

    # ---------------------------------------------------------------- state that others may have put there

    def _has_state(self, p: Tensor) -> bool:
        return is_ours(self._state.get(p))

    def _match(self, p: Tensor, layout: StateLayout, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of state of any origin, and ``step``; a CheckpointMismatchError if it does not fit."""
        match_names(state, layout, self._title(p))
        own = {name: state[name] for name in ("step", *layout.tensors)}
        local = {name: self._shards[p].unwrap(x) if isinstance(x, Tensor) else x for name, x in own.items()}
        match_tensors(local, layout, self._title(p))
        return local

    def _title(self, p: Tensor) -> str:
        return f"{self._shards[p].name} of shape {tuple(p.shape)}"

    # ---------------------------------------------------------------- layout and state

    def _saved_layout(self, p: Tensor, layout: StateLayout) -> StateLayout:
        """What the state of ``p`` describes in a state dict."""
        return replace(layout, spans=self._shards[p].saved_spans)

    def _find_layouts(self, tensors: Iterable[Tensor]) -> dict[Tensor, StateLayout]:
        """Layouts of those tensors (all in the param groups) that have none yet; changes nothing."""
        wanted = {tensor for tensor in tensors if tensor not in self._layouts}
        layouts: dict[Tensor, StateLayout] = {}
        if not wanted:
            return layouts
        for index, group in enumerate(self._owner.param_groups):
            config = None
            for position, tensor in enumerate(group["params"]):
                if tensor in wanted:
                    config = config or MicroAdamConfig.from_dict(group)
                    place = Place(tensor, index, position, len(group["params"]), self.names, self._exchange)
                    self._shards[tensor] = find_shard(place)
                    layouts[tensor] = StateLayout(self._shards[tensor].spans, config)
        return layouts

    def _set_state(self, p: Tensor, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        """Keep these flat state tensors and ``step`` as the state of ``p``."""
        wrap = self._shards[p].wrap
        shaped = shape_state(layout, state)
        others = {name: x for name, x in (self._state.get(p) or {}).items() if name not in OWN_NAMES}
        own = {name: wrap(tensor) if name in layout.tensors else tensor for name, tensor in shaped.items()}
        self._state[p] = {**others, **own}
        self._keep(p, layout)

    def _keep(self, p: Tensor, layout: StateLayout) -> None:
        """The state of ``p`` is what ``layout`` says, and stays so until one of its tensors is replaced."""
        self._layouts[p] = layout
        self._checked[id(p)] = CheckedState(self._shards[p], layout, self._state[p])
        if self._exchange is not None:
            self._exchange.forget(p)

    def _step_device(self, p: Tensor) -> torch.device:
        """Where the steps of ``p`` are counted."""
        return p.device if self._counts_on_device else torch.device("cpu")

    def _step_tensor(self, p: Tensor, step: int) -> Tensor:
        return torch.tensor(step, dtype=torch.int64, device=self._step_device(p))
