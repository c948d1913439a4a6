"""DeepSpeed: flat fp32 or bf16 shards (ZeRO-1, 2, 3, BF16_Optimizer) and master copies (stage 0 in 16 bit).

DeepSpeed replaces the parameters in the param groups after construction. What a flat shard holds is read from what it
leaves on the model's parameters; facts about its internals were measured with deepspeed 0.19.8.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, UnsupportedLayoutError
from ..layout import ShardSpan, plain_fqn
from . import deepspeed_sparse
from .base import ExchangingOptimizer, Place, Shard
from .cuts import share_spans
from .names import NamedParameter


def whitelist(optimizer_class: type) -> None:
    """Let ZeRO accept the class without ``zero_allow_untested_optimizer``; nothing happens without DeepSpeed."""
    if sys.modules.get("deepspeed") is None:
        return
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
        _known_classes.append(optimizer_class)
    _hook_initialize()


_known_classes: list[type] = []


def _hook_initialize() -> None:
    """Look at every engine that is built around one of our optimizers.

    `DeepSpeedEngine._do_optimizer_sanity_check` gets the optimizer when the configuration is complete and before ZeRO
    replaces its parameters; there is no public hook at that point.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._do_optimizer_sanity_check
    if hasattr(original, "looks_for_microadam"):
        return

    @functools.wraps(original)
    def sanity_check(engine: Any, optimizer: Any) -> Any:
        return prepare(engine, optimizer) if type(optimizer) in _known_classes else original(engine, optimizer)

    def prepare(engine: Any, optimizer: ExchangingOptimizer) -> Any:
        refuse_unsupported(engine)
        if optimizer.exchange_settings.shards_state:
            raise ConfigError(
                "optimizer option shard_state is for DDP; DeepSpeed shards the state itself: remove it, and choose a "
                "ZeRO stage from 1 on."
            )
        optimizer.names.rename(engine.param_names)
        optimizer.names.record_sharded()
        wrapper = original(engine, optimizer)
        if optimizer.exchange_settings.sparse_allgather:
            deepspeed_sparse.prepare(engine, wrapper)
        return wrapper

    sanity_check.looks_for_microadam = True  # type: ignore[attr-defined]
    DeepSpeedEngine._do_optimizer_sanity_check = sanity_check


def refuse_unsupported(engine: Any) -> None:
    """Raise at `deepspeed.initialize` for what DeepSpeed would fail at later, or do wrong.

    Raises:
        ConfigError: Names the option and the remedy.
    """
    config = engine._config
    zero, bf16 = config.zero_config, config.bfloat16_config
    offload = zero.offload_optimizer
    offloaded = offload is not None and offload.device != "none"
    refused = {
        "zero_optimization.elastic_checkpoint": (
            zero.elastic_checkpoint,
            "it merges parameter-shaped states only; remove it and resume on another number of ranks with "
            "microadam_dist.deepspeed.load_checkpoint",
        ),
        "checkpoint.load_universal": (
            config.load_universal_checkpoint,
            "universal checkpoints hold Adam's moments only; remove it and resume on another number of ranks with "
            "microadam_dist.deepspeed.load_checkpoint",
        ),
        "zero_optimization.offload_optimizer.ratio below 1": (
            offloaded and offload.ratio < 1,
            "DeepSpeed splits the step with DeepSpeedCPUAdam only; set it to 1.0",
        ),
        "zero_optimization.offload_optimizer.device = nvme": (
            offloaded and offload.device == "nvme",
            "DeepSpeed swaps parameter-shaped fp32 states only; use device = cpu",
        ),
        "bf16.bf16_master_weights_and_grads with offload_optimizer": (
            bf16.bf16_master_weights_and_grads and offloaded,
            "DeepSpeed has it for DeepSpeedCPUAdam only; remove one of the two",
        ),
        "bf16.bf16_master_weights_and_grads without bf16.bf16_optimizer_states": (
            bf16.bf16_master_weights_and_grads and not bf16.bf16_optimizer_states,
            "DeepSpeed has it for DeepSpeedCPUAdam only; set bf16_optimizer_states to true as well",
        ),
        "fp16.fp16_master_weights_and_grads": (
            config.float16_config.fp16_master_weights_and_grads,
            "DeepSpeed has it for DeepSpeedCPUAdam only; remove it, or use the bf16 options of that name",
        ),
        "zero_optimization.zenflow": (zero.zenflow is not None, "it needs DeepSpeedCPUAdam; remove it"),
    }
    for option, (is_set, remedy) in refused.items():
        if is_set:
            raise ConfigError(f"DeepSpeed option {option} does not work with MicroAdam: {remedy}.")


def find_shard(place: Place) -> Shard | None:
    """A flat shard or a master copy, by what DeepSpeed left on the model's parameters."""
    groups = place.names.sharded
    if groups is None:
        return None  # no engine of DeepSpeed has got this optimizer
    model = [named for group in groups for named in group]
    if any(hasattr(named.param, "_z3_optimizer") for named in model):
        spans = tuple(_stage3_spans(place.tensor, model))
        return ZeroShard(place.tensor, spans, _holder(spans, model).ds_process_group)
    if any(hasattr(named.param, "_hp_mapping") for named in model):
        spans = tuple(_stage1_2_spans(place.tensor, model))
        return ZeroShard(place.tensor, spans, _holder(spans, model)._dp_group)
    return _master_copy(place, groups[place.group])


@dataclass(frozen=True, eq=False)
class ZeroShard(Shard):
    """A flat shard of ZeRO.

    Attributes:
        ranks: Those among which its parameters are cut.
    """

    ranks: dist.ProcessGroup

    @property
    def may_be_probed(self) -> bool:
        """DeepSpeed does not probe here, and a rank may hold nothing but rows of an embedding that saw no token.

        Its gradients are zero then, while the other ranks have some and count the step.
        """
        return False

    @property
    def sharding_group(self) -> dist.ProcessGroup:
        """See `Shard.sharding_group`."""
        return self.ranks


def _holder(spans: Sequence[ShardSpan], model: Sequence[NamedParameter]) -> Any:
    """A parameter that has a part in the shard; any one if the shard is nothing but padding."""
    held = {span.fqn for span in spans}
    return next((named.param for named in model if named.fqn in held), model[0].param)


def _stage3_spans(shard: Tensor, model: Sequence[NamedParameter]) -> Iterator[ShardSpan]:
    """A sub-group's flat shard holds one interval of each of its parameters, with padding between them.

    The padding is uninitialised memory; it is in no span, so it is never read.
    """
    zero = next(named.param._z3_optimizer for named in model if hasattr(named.param, "_z3_optimizer"))
    sub_group = _index_of(shard, zero.fp32_partitioned_groups_flat)
    for named in model:
        param: Any = named.param
        group, offset, _ = zero.grad_position[zero.get_param_id(param)]
        if group != sub_group:
            continue
        start = dist.get_rank(param.ds_process_group) * param.partition_numel()
        numel = max(0, min(param.partition_numel(), param.ds_numel - start))
        yield ShardSpan(named.fqn, tuple(param.ds_shape), min(start, param.ds_numel), numel, offset)


def _stage1_2_spans(shard: Tensor, model: Sequence[NamedParameter]) -> Iterator[ShardSpan]:
    """A group's flat shard is one rank's share of a buffer in which the group's parameters follow each other.

    The model's parameters are views into that buffer. `_hp_mapping` tells which buffer belongs to the shard; its
    offsets are not used because they are wrong with ``round_robin_gradients``.
    """
    shard_storage = shard.untyped_storage().data_ptr()
    owner: Any = next(
        (
            named.param
            for named in model
            if (mapping := getattr(named.param, "_hp_mapping", None)) is not None
            and mapping.hp_fragment.untyped_storage().data_ptr() == shard_storage
        ),
        None,
    )
    if owner is None:
        return  # this rank's share of the buffer is padding only
    buffer = owner.untyped_storage().data_ptr()
    shard_start = dist.get_rank(owner._dp_group) * shard.numel()
    members = [named for named in model if named.param.untyped_storage().data_ptr() == buffer]
    members.sort(key=lambda named: named.param.storage_offset())
    placed = ((named.fqn, tuple(named.param.shape), int(named.param.storage_offset())) for named in members)
    yield from share_spans(placed, shard_start, shard_start + shard.numel())


def _master_copy(place: Place, trained: Sequence[NamedParameter]) -> Shard | None:
    """Stage 0 in bf16 or fp16: an fp32 clone of every trained parameter, in the order of the group."""
    if len(trained) != place.group_size or trained[place.position].shape != tuple(place.tensor.shape):
        return None
    return Shard(place.tensor, (ShardSpan.whole(trained[place.position].fqn, tuple(place.tensor.shape)),))


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


def publish_master_weights(engine: Any) -> None:
    """Bring the module's weights, on all ranks, up to the master weights the optimizer holds."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for master, flat, partitions in zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            flat.data.copy_(master.data)
            for partition, updated in zip(partitions, zero.unflatten(flat, partitions), strict=True):
                partition.data = updated.data
        zero.checkpoint_event_epilogue()  # gathers the small parameters that stay whole on every rank
    elif hasattr(zero, "update_lp_params"):  # stages 1 and 2
        zero.update_lp_params()
    elif hasattr(zero, "fp32_groups"):  # stage 0 with master copies
        for masters, params in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
            for master, param in zip(masters, params, strict=True):
                param.data.copy_(master.data)


def module_tensors(engine: Any) -> dict[str, Tensor]:
    """The module's parameters and those of its buffers that are saved, by the names that spans have.

    Tied parameters are there under each of their names.
    """
    saved = {plain_fqn(name) for name in engine.module.state_dict()}
    named = chain(
        engine.module.named_parameters(remove_duplicate=False), engine.module.named_buffers(remove_duplicate=False)
    )
    return {plain: tensor for name, tensor in named if (plain := plain_fqn(name)) in saved}


def load_untrained(engine: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole tensors into those of the module; under ZeRO-3 into each rank's part. Call it on every rank."""
    import deepspeed

    own = module_tensors(engine)
    with torch.no_grad():
        for name, tensor in tensors:
            gathered = hasattr(own[name], "ds_id")
            with deepspeed.zero.GatheredParameters([own[name]], modifier_rank=0, enabled=gathered):
                own[name].copy_(tensor)


def _index_of(tensor: Tensor, tensors: Sequence[Tensor]) -> int:
    for index, candidate in enumerate(tensors):
        if candidate is tensor:
            return index
    raise UnsupportedLayoutError(
        f"a tensor of {tensor.numel()} elements is none of DeepSpeed's ZeRO-3 sub-groups. This DeepSpeed version may "
        "lay out its shards in another way than the tested one (0.19.8)."
    )
