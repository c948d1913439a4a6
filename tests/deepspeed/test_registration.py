"""How DeepSpeed finds and accepts the class, and what it may do to our tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import microadam_dist
from microadam_dist import ConfigError, MicroAdam
from tests.deepspeed.engines import (
    SETTINGS,
    base_optimizer,
    full_weights,
    initialize,
    make_config,
    make_gradients,
    make_model,
    train,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed


def test_register_is_idempotent() -> None:
    microadam_dist.deepspeed.register()
    microadam_dist.deepspeed.register()
    assert torch.optim.MicroAdam is MicroAdam  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["microadam", "MICROADAM", "Microadam"])
def test_name_in_any_case(name: str) -> None:
    assert getattr(torch.optim, name) is MicroAdam
    with pytest.raises(AttributeError, match="'torch.optim' has no attribute 'MicroAdamW'"):
        _ = torch.optim.MicroAdamW  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [("deepspeed", "microadam_dist"), ("microadam_dist", "deepspeed")], ids="-then-".join)
def test_import_order_does_not_matter(order: tuple[str, str]) -> None:
    script = f"""
import {order[0]}, {order[1]}, torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS as supported
optimizer = torch.optim.MicroAdam([torch.nn.Parameter(torch.zeros(4))])
again = torch.optim.MicroAdam([torch.nn.Parameter(torch.zeros(4))])
assert supported.count(type(optimizer)) == 1, supported
class Mine(type(optimizer)): pass
Mine([torch.nn.Parameter(torch.zeros(4))])
assert supported.count(Mine) == 1, supported
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})


def _client_optimizers(rank: int, world_size: int) -> list[Any]:
    results = []
    for stage in (0, 1, 2, 3):
        for client in (False, True):
            model, kwargs = make_model(), {}
            if client:
                kwargs["optimizer"] = MicroAdam(model.named_parameters(), **SETTINGS)
            engine = initialize(model, make_config(stage, torch.bfloat16), **kwargs)
            train(engine, make_gradients(3, torch.bfloat16))
            results.append(full_weights(engine))
            engine.destroy()
    return results


def test_client_optimizer_gives_the_same_bits_as_json() -> None:
    for results in run_ranks(_client_optimizers, 2):
        for from_json, client in zip(results[::2], results[1::2], strict=True):
            assert all(torch.equal(from_json[name], client[name]) for name in from_json)


def _two_groups(rank: int, world_size: int) -> list[Any]:
    results = []
    for stage in (None, 0, 1, 2, 3):
        model = make_model()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        model.embed.weight.requires_grad_(False)  # a frozen parameter stays in its group
        groups = [
            {"params": matrices, "weight_decay": 0.1, "window_size": 2},
            {"params": vectors, "weight_decay": 0.0, "lr": 1e-3},
        ]
        if stage is None:
            optimizer = MicroAdam(groups, **SETTINGS)
            for grads in make_gradients(10):
                model(grads).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append({name.removesuffix(".weight"): p.detach() for name, p in model.named_parameters()})
            continue
        engine = initialize(model, make_config(stage, torch.float32), model_parameters=groups)
        train(engine, make_gradients(10))
        results.append(full_weights(engine))
        engine.destroy()
    return results


def test_two_groups_with_a_frozen_parameter() -> None:
    plain, *staged = run_ranks(_two_groups, 1)[0]  # one rank: no block is cut, so every weight is equal
    for weights in staged:
        assert all(torch.equal(plain[name], weights[name]) for name in plain)


def _poison_padding(rank: int, world_size: int) -> int:
    engine = initialize(make_model(), make_config(3, torch.float32))
    train(engine, make_gradients(1))
    (shard,) = engine.optimizer.fp32_partitioned_groups_flat
    layout = base_optimizer(engine).sharded._layouts[shard]
    padding = torch.ones(shard.numel(), dtype=torch.bool)
    for span in layout.spans:
        padding[span.offset : span.offset + span.numel] = False
    shard.data[padding] = float("nan")
    train(engine, make_gradients(3))
    assert shard.data[padding].isnan().all()
    assert shard.data[~padding].isfinite().all()
    assert base_optimizer(engine).num_nonfinite_blocks == 0
    return int(padding.sum())


def test_zero3_padding_is_neither_read_nor_written() -> None:
    assert sum(run_ranks(_poison_padding, 4)) > 0


def _bad_settings(rank: int, world_size: int) -> list[str]:
    messages = []
    for params in ({"windowsize": 3}, {"shard_state": True}, {"adam_w_mode": False}, {"weight_exchange": "newest"}):
        with pytest.raises(ConfigError) as error:
            initialize(make_model(), make_config(2, torch.bfloat16, params=params))
        messages.append(str(error.value))
    return messages


def test_bad_json_settings_are_named_at_initialize() -> None:
    ((unknown, not_here, coupled, exchange),) = run_ranks(_bad_settings, 1)
    assert unknown == "unknown setting 'windowsize': did you mean 'window_size'?"
    assert "shard_state is for DDP" in not_here
    assert "adam_w_mode=False: weight decay is always decoupled" in coupled
    assert "weight_exchange='newest' is given without shard_state" in exchange


CPU_SCRIPT = """
import os
import deepspeed
import microadam_dist
microadam_dist.deepspeed.disable_shm_allreduce()
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
deepspeed.init_distributed()
print("op:", deepspeed.comm.comm.cdb.shm_comm_op)
deepspeed.comm.destroy_process_group()
"""


def test_one_line_keeps_cpu_ranks_on_gloo(tmp_path: Path) -> None:
    """Nothing is compiled, and nothing is left in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", CPU_SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "op: None" in result.stdout
    assert not list(tmp_path.iterdir())
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "deepspeed" in name or "shm_allreduce" in name}
