"""PipelineModule: every rank has other layers, under names of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microadam_dist
from microadam_dist import CheckpointMismatchError, ConfigError
from microadam_dist.checkpoint.deepspeed import read_checkpoint
from microadam_dist.checkpoint.deepspeed_reshard import reshard_checkpoint
from tests.deepspeed.engines import SETTINGS, base_optimizer, initialize, make_config
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
WIDTH, NUM_LAYERS, SAVED_AT, END = 72, 4, 3, 5
CASES = {
    "zero0-fp32": (0, torch.float32),
    "zero1-fp32": (1, torch.float32),
    "zero1-bf16": (1, torch.bfloat16),
}


def _layers(seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Linear(WIDTH, WIDTH) for _ in range(NUM_LAYERS)]


def _engine(stage: int, dtype: torch.dtype, seed: int = 0) -> Any:
    from deepspeed.comm import init_distributed
    from deepspeed.pipe import PipelineModule

    microadam_dist.deepspeed.disable_shm_allreduce()
    init_distributed("gloo")
    model = PipelineModule(_layers(seed), num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    config = make_config(stage, dtype, gradient_accumulation_steps=2)
    return initialize(model, config, model_parameters=list(model.parameters()))


def _data(dtype: torch.dtype, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for index in range(2 * END):
        pair = torch.randn(2, 1, WIDTH, generator=generator).to(dtype)
        if index >= 2 * first_step:
            yield pair[0], pair[1]


def _weights(engine: Any) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def _train_and_resume(rank: int, world_size: int, folder: str) -> list[tuple[set[str], dict[str, Tensor], str]]:
    results = []
    for case, (stage, dtype) in CASES.items():
        engine, data = _engine(stage, dtype), _data(dtype)
        for _ in range(SAVED_AT):
            engine.train_batch(data)
        path = f"{folder}/{case}"
        engine.save_checkpoint(path)
        then = _weights(engine)
        for _ in range(SAVED_AT, END):
            engine.train_batch(data)
        end = _weights(engine)
        names = {span.fqn for layout in base_optimizer(engine).sharded.layouts().values() for span in layout.spans}

        resumed, data = _engine(stage, dtype, seed=1), _data(dtype, SAVED_AT)
        before = _weights(resumed)
        with pytest.raises(CheckpointMismatchError) as error:
            microadam_dist.deepspeed.load_checkpoint(resumed, path)
        assert _same(_weights(resumed), before)
        resumed.load_checkpoint(path)
        assert _same(_weights(resumed), then)
        for _ in range(SAVED_AT, END):
            resumed.train_batch(data)
        assert _same(_weights(resumed), end)
        results.append((names, end, str(error.value)))
    with pytest.raises(ConfigError, match="stage = 0 with bf16 and a PipelineModule"):
        _engine(0, torch.bfloat16)
    return results


def _trained_in_one_process() -> dict[str, Tensor]:
    from microadam_dist import MicroAdam

    model = nn.Sequential(*_layers(0))
    optimizer = MicroAdam(model.named_parameters(), **SETTINGS)
    data = _data(torch.float32)
    for _ in range(END):
        for _ in range(2):
            x, y = next(data)
            (nn.functional.mse_loss(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in model.named_parameters()}


def test_pipelines_train_resume_at_the_same_size_and_are_refused_elsewhere(tmp_path: Path) -> None:
    first, second = run_ranks(_train_and_resume, 2, str(tmp_path))
    expected = _trained_in_one_process()
    for case, (names, weights, message), (other_names, other_weights, other_message) in zip(
        CASES, first, second, strict=True
    ):
        assert not names & other_names
        assert names | other_names == expected.keys()
        if case.endswith("fp32"):
            assert _same({**weights, **other_weights}, expected)
        for text in (message, other_message):
            assert "pipeline parallelism" in text and "engine.load_checkpoint on the same number of ranks" in text
        with pytest.raises(CheckpointMismatchError, match="pipeline parallelism"):
            reshard_checkpoint(tmp_path / case, tmp_path / "target", 1)


def test_tensor_parallelism_is_called_so(tmp_path: Path) -> None:
    folder = tmp_path / "global_step1"
    folder.mkdir()
    for mp_rank in (0, 1):
        torch.save({}, folder / f"mp_rank_{mp_rank:02d}_model_states.pt")
    with pytest.raises(CheckpointMismatchError, match="tensor parallelism"):
        read_checkpoint(tmp_path, "global_step1")
