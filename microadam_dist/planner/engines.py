"""What each engine puts on a rank: which parts of the parameters, in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ..engines.cuts import FlatShard, fsdp1_shard, row_shard, zero3_shard, zero12_shard
from ..errors import ConfigError
from ..layout import ShardSpan
from .shapes import Shapes


class Engine(str, Enum):
    """How the model is spread over the ranks."""

    single = "single"
    ddp = "ddp"
    ddp_sharded = "ddp-sharded"
    fsdp1 = "fsdp1"
    fsdp2 = "fsdp2"
    zero0 = "zero0"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"

    @property
    def is_zero(self) -> bool:
        """Whether it is DeepSpeed's."""
        return self.value.startswith("zero")

    @property
    def shards_optimizer(self) -> bool:
        """Whether it is ZeRO-1, 2 or 3, whose optimizer steps one flat shard of (master) weights."""
        return self in (Engine.zero1, Engine.zero2, Engine.zero3)


class Dtype(str, Enum):
    """Precision of a run, as in `launch/train.py`."""

    fp32 = "fp32"
    bf16 = "bf16"
    pure_bf16 = "pure-bf16"


@dataclass(frozen=True)
class Precision:
    """Bytes of an element.

    Attributes:
        weight: Of the module's weights and of the gradients the backward pass leaves.
        master: Of the copy of the weights that is stepped in their place, and of its gradient; 0: there is none.
        compute: In matrix products.
    """

    weight: int
    master: int
    compute: int

    @property
    def stepped(self) -> int:
        """Bytes of an element of the tensors the optimizer is given."""
        return self.master or self.weight


def find_precision(engine: Engine, dtype: Dtype, *, master_free: bool = False) -> Precision:
    """Where the engine keeps what.

    DeepSpeed casts the module to bf16 and keeps an fp32 copy, in ZeRO-1, 2 and 3 also of an fp32 module. Elsewhere bf16
    means fp32 weights and bf16 arithmetic, by autocast or the mixed precision of FSDP.

    Raises:
        ConfigError: The engine has no such mode.
    """
    if master_free and not (engine.shards_optimizer and dtype is Dtype.bf16):
        raise ConfigError(
            f"--master-free with --engine {engine.value} --dtype {dtype.value}: it is a mode of bf16 under ZeRO-1, 2 "
            "and 3. For bf16 weights without a copy elsewhere use --dtype pure-bf16."
        )
    if dtype is Dtype.pure_bf16:
        if engine.shards_optimizer:
            raise ConfigError(
                f"--dtype pure-bf16 with --engine {engine.value}: ZeRO always steps a copy of the weights. For a bf16 "
                "copy use --dtype bf16 --master-free."
            )
        return Precision(weight=2, master=0, compute=2)
    if dtype is Dtype.fp32:
        return Precision(weight=4, master=4 if engine.shards_optimizer else 0, compute=4)
    if engine.is_zero:
        return Precision(weight=2, master=2 if master_free else 4, compute=2)
    return Precision(weight=4, master=0, compute=2)


@dataclass(frozen=True)
class RankShards:
    """The weights on one rank.

    Attributes:
        stepped: What the optimizer is given: the intervals of parameters in each of its tensors.
        stepped_numels: Elements of each of these tensors.
        weight_numel: Elements of the weights this rank stores, padding included.
        grad_numel: Elements of the gradients it hands to the optimizer, padding included.
    """

    stepped: tuple[tuple[ShardSpan, ...], ...]
    stepped_numels: tuple[int, ...]
    weight_numel: int
    grad_numel: int

    @classmethod
    def one_tensor_each(cls, shards: Sequence[FlatShard], weight_numel: int, grad_numel: int) -> RankShards:
        """Where every interval is a tensor of its own."""
        spans = tuple(span for shard in shards for span in shard.spans)
        return cls(tuple((span,) for span in spans), tuple(span.numel for span in spans), weight_numel, grad_numel)


def rank_shards(
    engine: Engine, units: Sequence[Shapes], world_size: int, rank: int, *, compute_bytes: int
) -> RankShards:
    """What one rank of the engine holds.

    Args:
        engine: The engine; for DeepSpeed one param group, and one sub-group under ZeRO-3.
        units: Name -> shape of the trained parameters of each FSDP unit; other engines take them together.
        world_size: Data-parallel ranks.
        rank: Which one.
        compute_bytes: Bytes of an element in matrix products.
    """
    shapes = {name: shape for unit in units for name, shape in unit.items()}
    if engine.shards_optimizer:
        flat = (zero3_shard if engine is Engine.zero3 else zero12_shard)(shapes, world_size, rank)
        weight_numel = flat.numel * (1 if engine is Engine.zero3 else world_size)
        return RankShards((flat.spans,), (flat.numel,), weight_numel, flat.numel)
    if engine is Engine.fsdp1:
        shards = [fsdp1_shard(unit, world_size, rank, alignment=16 // compute_bytes) for unit in units]
    else:
        parts = world_size if engine in (Engine.fsdp2, Engine.ddp_sharded) else 1
        shards = [row_shard(name, shape, parts, rank % parts) for name, shape in shapes.items()]
    held = sum(shard.numel for shard in shards)
    if engine is Engine.ddp_sharded:
        held = sum(span.global_numel for shard in shards for span in shard.spans)
    return RankShards.one_tensor_each(shards, held, held)
