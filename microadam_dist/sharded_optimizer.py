"""The half of `MicroAdam` that knows what its tensors hold, and keeps, saves and loads their state."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from .checkpoint.format import APART, APART_KEY, LAYOUT_KEY, describe_layouts, read_layouts
from .checkpoint.match import match_groups, match_names, match_spans, match_tensors, state_dict_parts
from .config import MicroAdamConfig
from .engines.base import NamedParameter, Shard, Slot, find_shard, process_rank
from .errors import CheckpointMismatchError
from .layout import DENSE_TENSORS, StateLayout
from .state import flatten_state, shape_state


class StateBytes(NamedTuple):
    """What this rank has allocated: parameters and bytes of state on the Top-K path and on the dense (AdamW) path."""

    sparse_numel: int
    sparse_bytes: int
    dense_numel: int
    dense_bytes: int


class ShardedOptimizer(Optimizer):
    """State of parameters that an engine may have sharded.

    Args:
        params, defaults: See `torch.optim.Optimizer`.
        exchange: See `engines.base.row_exchange`.
        counts_on_device: Whether steps are counted where the parameters are.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any], *, exchange: Any, counts_on_device: bool) -> None:
        self._constructed: list[list[NamedParameter]] = []
        self._shards: dict[Tensor, Shard] = {}  # how the data of a tensor is reached; found with its layout
        self._layouts: dict[Tensor, StateLayout] = {}
        self._exchange = exchange
        self._counts_on_device = counts_on_device
        self._has_loaded_shards = False  # and has not stepped since
        self.loads_shards_later = False  # set by who calls load_sharded after load_state_dict
        super().__init__(params, defaults)

    def name_parameters(self, names: Mapping[Tensor, str]) -> None:
        """Give parameters the names they have in the model, for checkpoints; parameters not in ``names`` keep theirs.

        DeepSpeed constructs an optimizer from unnamed parameters; its adapter calls this.
        """
        for group in self._constructed:
            group[:] = [replace(named, fqn=names.get(named.param, named.fqn)) for named in group]

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

    # ---------------------------------------------------------------- layout and state

    def _saved_layout(self, p: Tensor) -> StateLayout:
        """What the state of ``p`` describes in a state dict."""
        return replace(self._layouts[p], spans=self._shards[p].saved_spans)

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

    def _set_state(self, p: Tensor, layout: StateLayout, state: Mapping[str, Tensor]) -> None:
        """Keep these flat state tensors and ``step`` as the state of ``p``."""
        wrap = self._shards[p].wrap
        shaped = shape_state(layout, state)
        self.state[p] = {name: tensor if name == "step" else wrap(tensor) for name, tensor in shaped.items()}
        self._layouts[p] = layout
        if self._exchange is not None:
            self._exchange.forget(p)

    def _unwrapped_state(self, p: Tensor, shard: Shard) -> Mapping[str, Tensor]:
        """This rank's part of the state tensors of ``p``, and ``step``."""
        state: dict[str, Tensor] = self.state[p]
        if type(shard).unwrap is Shard.unwrap:  # a dictionary a tensor and step is work for the collector
            return state
        return {"step": state["step"], **self._local_state(p)}

    def _local_state(self, p: Tensor) -> dict[str, Tensor]:
        """This rank's part of the state tensors of ``p``, without ``step``."""
        unwrap = self._shards[p].unwrap
        return {name: unwrap(self.state[p][name]) for name in self._layouts[p].tensors}

    def _step_device(self, p: Tensor) -> torch.device:
        """Where the steps of ``p`` are counted."""
        return p.device if self._counts_on_device else torch.device("cpu")

    def __getstate__(self) -> dict[str, Any]:
        # The base class leaves out its hooks, and everything it does not know.
        hooks = {name for name in self.__dict__ if name.startswith("_optimizer_")}
        own = {name: value for name, value in self.__dict__.items() if name not in hooks}
        return {**own, **super().__getstate__()}
