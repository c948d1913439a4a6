"""DeepSpeed: flat fp32 or bf16 shards (ZeRO-1, 2, 3, BF16_Optimizer) and master copies (stage 0 in 16 bit).

DeepSpeed replaces the parameters in the param groups after construction. What a flat shard holds is read from what it
leaves on the model's parameters; facts about its internals were measured with deepspeed 0.19.8.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError, UnsupportedLayoutError
from ..layout import ShardSpan
from . import deepspeed_fragments, deepspeed_sparse, names
from .base import ExchangingOptimizer, Place, Shard
from .cuts import share_spans
from .deepspeed_experts import ExpertNames, has_frozen_experts
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


class NativeLoad(NamedTuple):
    """A call of `engine.load_checkpoint`.

    Attributes:
        folder, tag: Its arguments.
        module: Whether it loads all of the module's tensors, and by name.
        optimizer: Whether it loads the optimizer's state.
    """

    folder: str
    tag: str | None
    module: bool
    optimizer: bool


NativeLoadCheck = Callable[[Any, NativeLoad], None]
_native_load_checks: list[NativeLoadCheck] = []


def before_native_load(check: NativeLoadCheck) -> NativeLoadCheck:
    """Call a function with every engine around one of our optimizers that is about to load a checkpoint."""
    _native_load_checks.append(check)
    return check


def _hook_load(engine_class: Any) -> None:
    original = engine_class.load_checkpoint
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint(engine: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(engine, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        exists = given["tag"] is not None or os.path.isfile(os.path.join(given["load_dir"], "latest"))
        if exists and type(getattr(engine, "basic_optimizer", None)) in _known_classes:  # else DeepSpeed returns None
            load = NativeLoad(
                given["load_dir"],
                given["tag"],
                module=given["load_module_strict"] and given["custom_load_fn"] is None,
                optimizer=given["load_optimizer_states"] and not given["load_module_only"],
            )
            for check in _native_load_checks:
                check(engine, load)
        return original(engine, *args, **kwargs)

    engine_class.load_checkpoint = load_checkpoint


def _hook_initialize() -> None:
    """Look at every engine that is built around one of our optimizers.

    `DeepSpeedEngine._do_optimizer_sanity_check` gets the optimizer when the configuration is complete and before ZeRO
    replaces its parameters, which `_configure_zero_optimizer` and `_configure_bf16_optimizer` do then; there are no
    public hooks at these points.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._do_optimizer_sanity_check
    if hasattr(original, "looks_for_microadam"):
        return
    _hook_load(DeepSpeedEngine)

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
        experts = ExpertNames(engine.module)
        optimizer.names.rename({param: experts.over_all_ranks(name) for param, name in engine.param_names.items()})
        optimizer.names.record_sharded()
        wrapper = original(engine, optimizer)
        if optimizer.exchange_settings.sparse_allgather:
            deepspeed_sparse.prepare(engine, wrapper)
        return wrapper

    def with_fragments(configure: Any) -> Any:
        @functools.wraps(configure)
        def configure_and_install(engine: Any, optimizer: Any) -> Any:
            wrapped = configure(engine, optimizer)
            if type(optimizer) in _known_classes:
                deepspeed_fragments.install(engine, wrapped)
                if hasattr(wrapped, "fp32_partitioned_groups_flat"):
                    _refuse_offloading_state(wrapped)
            return wrapped

        return configure_and_install

    sanity_check.looks_for_microadam = True  # type: ignore[attr-defined]
    DeepSpeedEngine._do_optimizer_sanity_check = sanity_check
    for name in ("_configure_zero_optimizer", "_configure_bf16_optimizer"):
        setattr(DeepSpeedEngine, name, with_fragments(getattr(DeepSpeedEngine, name)))


def _refuse_offloading_state(zero: Any) -> None:
    """ZeRO-3 can move Adam's two moments only, and forbids the rest by an ``assert``, which may be switched off."""
    original = zero.offload_states

    @functools.wraps(original)
    def offload_states(include: Any = None, *args: Any, **kwargs: Any) -> None:
        refused = [state for state in ("optim_states", "hp_params") if include is None or state in include]
        if refused:
            raise ConfigError(
                f"engine.offload_states() of {' and '.join(refused)} does not work with MicroAdam under ZeRO-3: "
                "DeepSpeed knows them of its FusedAdam only. Nothing has been moved; name others in include "
                "(lp_params, lp_grads, contiguous_grad_buffer), use ZeRO-2, or zero_optimization.offload_optimizer."
            )
        original(include, *args, **kwargs)

    zero.offload_states = offload_states


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
        "zero_optimization.stage = 0 with bf16 and a PipelineModule": (
            engine.pipeline_parallelism and bf16.enabled and zero.stage == 0,
            "DeepSpeed cannot load the checkpoints that it saves then; use stage 1",
        ),
        "zero_optimization.stage = 2 with frozen experts": (
            zero.stage == 2 and has_frozen_experts(engine.module),
            "its engine.load_checkpoint gives every rank the frozen experts of the first one; use stage 1",
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
        return ZeroShard(place.tensor, spans, _holder(spans, [*groups[place.group], *model]).ds_process_group)
    if any(hasattr(named.param, "_hp_mapping") for named in model):
        spans = tuple(_stage1_2_spans(place.tensor, model))
        return ZeroShard(place.tensor, spans, _holder(spans, [*groups[place.group], *model])._dp_group)
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


def _holder(spans: Sequence[ShardSpan], candidates: Sequence[NamedParameter]) -> Any:
    """A parameter that has a part in the shard; the first one if the shard is nothing but padding."""
    held = {span.fqn for span in spans}
    return next((named.param for named in candidates if named.fqn in held), candidates[0].param)


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
    """See `names.module_tensors`; experts are called by their number in the layer."""
    experts = ExpertNames(engine.module)
    return {experts.over_all_ranks(name): tensor for name, tensor in names.module_tensors(engine.module).items()}


def frozen_parameters(engine: Any) -> set[str]:
    """Names of the module's parameters that DeepSpeed has left to nobody: they required no gradient then."""
    trained = {named.fqn for group in engine.basic_optimizer.names.sharded for named in group}
    experts = ExpertNames(engine.module)
    return {experts.over_all_ranks(name) for name, _ in engine.module.named_parameters()} - trained


def cuts_module(engine: Any) -> bool:
    """Whether the ranks have other parts of the module, and not only MoE layers' experts: pipelines, AutoTP, AutoEP."""
    experts = engine._config.expert_parallel_config
    return engine.pipeline_parallelism or engine.mp_world_size > 1 or (experts is not None and experts.enabled)


def written_stage(engine: Any) -> int:
    """The ZeRO stage that the engine's checkpoints are of: 1 and 2 write the same, which is 2."""
    if not engine.zero_optimization():
        return 0
    return 3 if engine.zero_optimization_partition_weights() else 2


def data_parallel_rank(engine: Any) -> int:
    """The number of this rank in the names of checkpoint files."""
    return dist.get_rank(getattr(engine.optimizer, "dp_process_group", None))


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
