"""A tiny training under each engine, for checkpoints that one version writes and a later one loads.

Weights and gradients are computed from names and steps in integers, and a gradient's average over 1, 2 or 3 ranks is
exact in fp32 and bf16: what is trained depends on no random generator, no machine and no matrix product.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DistributedDataParallel

import microadam_dist
from microadam_dist import MicroAdam, load_sharded, save_sharded
from microadam_dist.config import LATER_SETTINGS
from tests.deepspeed.engines import base_optimizer, full_weights, initialize, make_config
from tests.distributed.models import GivenGradients, everything, shard

# Blocks of two lengths in a row, several equal ones, blocks of 48, 48 and 34; no matrix has its middle at a block edge.
SHAPES = {"wide": (15, 300), "window": (25, 192), "packed": (33, 130), "bias": (40,)}
GROUPS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("wide", "bias"), {}),
    (("window",), {"window_size": 3, "block_size": 64, "weight_decay": 0.1}),
    (("packed",), {"window_size": 3, "block_size": 64, "density": 0.2, "packed_window": True}),
]
LR, BLOCK_SIZE = 1e-2, 256
SAVED_AT, END = 3, 5
WRITTEN_BY = 2  # ranks

Digests = dict[str, str]


def values(name: str, when: int | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter's gradient at a step, or what it begins with; one in 8 bits, and so are its triple and its third."""
    shape = SHAPES[name]
    random = hashlib.shake_256(f"{name} {when}".encode()).digest(2 * math.prod(shape))
    first, second = torch.tensor(list(random)).view(2, *shape)
    magnitude = 3 * (1 + first % 28) * 2 ** (second >> 6)
    return (torch.where(second % 2 == 0, magnitude, -magnitude) / 1024).to(dtype)


def make_model() -> GivenGradients:
    model = GivenGradients(SHAPES)
    for name in SHAPES:
        getattr(model, name).weight.data = values(name, "begin")
    return model


def plain_name(name: str) -> str:
    """What a parameter, or its state, is called where nothing is wrapped."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = {plain_name(name): (name, p) for name, p in model.named_parameters()}
    return [{"params": [named[f"{name}.weight"] for name in names], **own} for names, own in GROUPS]


def digest(tensor: Tensor) -> str:
    """Of the bits of each row, or of all of a vector; one after the other."""
    rows = tensor.detach().contiguous().view(len(tensor) if tensor.ndim > 1 else 1, -1).view(torch.uint8)
    return " ".join(hashlib.sha256(row.numpy().tobytes()).hexdigest()[:8] for row in rows)


def num_differing(got: str, expected: str) -> int:
    """Rows with other bits."""
    return sum(a != b for a, b in zip(got.split(), expected.split(), strict=True))


def digests(tensors: dict[str, Tensor]) -> Digests:
    return {name: digest(tensor) for name, tensor in tensors.items()}


def by_rank(mine: Digests) -> Digests:
    """What all ranks have; a collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {f"rank {rank}: {name}": text for rank, found in enumerate(everyone) for name, text in found.items()}


class Plain:
    """Without an engine.

    Args:
        saved: The checkpoint to go on from; None to begin.

    Attributes:
        named_by_wrapper: Whether the optimizer gets the parameter names of the wrapped model.
    """

    named_by_wrapper = False

    def __init__(self, saved: Path | None = None) -> None:
        model = make_model()
        if saved is not None:
            model.load_state_dict(torch.load(saved / "weights.pt"))
        self.model = self.wrap(model)
        groups = param_groups(self.model if self.named_by_wrapper else model)
        lr = LR if saved is None else 1.0  # it comes with the state
        self.optimizer = MicroAdam(groups, lr=lr, block_size=BLOCK_SIZE, **self.options())
        if saved is not None:
            self.load_state(saved)

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def options(self) -> dict[str, Any]:
        return {}

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.model({name: values(name, step) for name in SHAPES}).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        weights = self.full_weights()
        if not dist.is_initialized() or dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(weights, folder / "weights.pt")
        self.save_state(folder)

    def save_state(self, folder: Path) -> None:
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load_state(self, folder: Path) -> None:
        """Whatever engine has saved it."""
        if (folder / "optimizer.pt").exists():
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
        elif (folder / "sharded").exists():
            load_sharded(self.optimizer, folder / "sharded")
        else:
            state = get_optimizer_state_dict(self.model, self.optimizer)
            # DCP asks for all that this version has; older ones lack settings.
            saved = dcp.FileSystemReader(folder / "dcp").read_metadata().state_dict_metadata
            for index, group in enumerate(state["param_groups"]):
                for name in [name for name in LATER_SETTINGS if f"param_groups.{index}.{name}" not in saved]:
                    del group[name]
            dcp.load(state, checkpoint_id=folder / "dcp")
            set_optimizer_state_dict(self.model, self.optimizer, state)

    def full_weights(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.everything().items() if name.endswith(".weight")}

    def everything(self) -> dict[str, Tensor]:
        return {plain_name(name): tensor for name, tensor in everything(self.optimizer).items()}

    def digests(self) -> Digests:
        """Of weights and state, the same on all ranks; by rows where they are whole."""
        return digests(self.everything())

    def close(self) -> None:
        pass


class ShardedStateDDP(Plain):
    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def options(self) -> dict[str, Any]:
        return {"shard_state": True}

    def save_state(self, folder: Path) -> None:
        save_sharded(self.optimizer, folder / "sharded")


class ShardedStateDDPByWrapper(ShardedStateDDP):
    """Its names begin with ``module.``, in the checkpoint too."""

    named_by_wrapper = True


class FSDP1(Plain):
    named_by_wrapper = True

    def wrap(self, model: nn.Module) -> nn.Module:
        fsdp = functools.partial(FSDP, use_orig_params=True, device_id=torch.device("cpu"))
        for name in ("wide", "packed"):
            setattr(model, name, fsdp(getattr(model, name)))
        return fsdp(model)

    def save_state(self, folder: Path) -> None:
        save_sharded(self.optimizer, folder / "sharded")

    def full_weights(self) -> dict[str, Tensor]:
        with FSDP.summon_full_params(self.model, writeback=False):
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def digests(self) -> Digests:
        held = self.everything()
        # A rank with none of a parameter's elements has nothing in its state, or no state.
        names = [n for n in held if not n.endswith(".weight") and held[n.rpartition(".")[0]].numel()]
        state = {name: held[name] for name in names}
        return {**digests(self.full_weights()), **by_rank(digests(state))}


class FSDP2(Plain):
    def wrap(self, model: nn.Module) -> nn.Module:
        return shard(model)

    def save_state(self, folder: Path) -> None:
        dcp.save(get_optimizer_state_dict(self.model, self.optimizer), checkpoint_id=folder / "dcp")


class DeepSpeed:
    """ZeRO; its own `save_checkpoint`, and its own `load_checkpoint` or, for other ranks and stages, ours."""

    def __init__(self, stage: int, dtype: torch.dtype, saved: Path | None = None, *, elastic: bool = False) -> None:
        self.stage, self.dtype = stage, dtype
        params = {"lr": LR if saved is None else 1.0, "block_size": BLOCK_SIZE}
        extra = {"zero_optimization": {"sub_group_size": 3000}} if stage == 3 else {}
        model = make_model()
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in param_groups(model)]
        self.engine = initialize(model, make_config(stage, dtype, params, **extra), model_parameters=groups)
        if saved is not None:
            load = functools.partial(microadam_dist.deepspeed.load_checkpoint, self.engine)
            _, client_state = (load if elastic else self.engine.load_checkpoint)(str(saved))
            assert client_state["epoch"] == 7 and self.engine.global_steps == SAVED_AT

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.engine.backward(self.engine({name: values(name, step, self.dtype) for name in SHAPES}))
            self.engine.step()

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), client_state={"epoch": 7})

    def digests(self) -> Digests:
        weights = {f"{name}.weight": weight for name, weight in full_weights(self.engine).items()}
        states = base_optimizer(self.engine).state.values()
        if self.stage == 0:  # one for each parameter
            tensors = [f"{name}.weight" for names, _ in GROUPS for name in names]
        else:
            tensors = [f"flat tensor {i}" for i in range(len(states))]
        state = {f"{n}.{key}": t for n, own in zip(tensors, states, strict=True) for key, t in own.items()}
        return {**digests(weights), **(digests(state) if self.stage == 0 else by_rank(digests(state)))}

    def close(self) -> None:
        self.engine.destroy()


ENGINES: dict[str, Any] = {
    "plain": Plain,
    "ddp": ShardedStateDDP,
    "ddp-names-of-wrapper": ShardedStateDDPByWrapper,
    "fsdp1": FSDP1,
    "fsdp2": FSDP2,
    "zero0-fp32": functools.partial(DeepSpeed, 0, torch.float32),
    "zero0-bf16": functools.partial(DeepSpeed, 0, torch.bfloat16),
    "zero1-fp32": functools.partial(DeepSpeed, 1, torch.float32),
    "zero2-bf16": functools.partial(DeepSpeed, 2, torch.bfloat16),
    "zero3-bf16": functools.partial(DeepSpeed, 3, torch.bfloat16),
}
