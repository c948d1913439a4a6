"""``microadam plan --fit``: what it proposes fits, and one more does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from microadam_dist.cli.app import app
from microadam_dist.config import MicroAdamConfig
from microadam_dist.planner.engines import Dtype, Engine
from microadam_dist.planner.fit import capacity, propose
from microadam_dist.planner.gpus import needed_bytes
from microadam_dist.planner.memory import Job, Optimizer, make_plan
from microadam_dist.planner.shapes import LLAMAS, LlamaShape


def needed(shape: LlamaShape, job: Job, batch: int | None = None, seq: int | None = None) -> int:
    job = dataclasses.replace(job, batch=batch or job.batch, seq=seq or job.seq)
    return needed_bytes(make_plan(shape, job)[Optimizer.microadam].total)


@pytest.mark.parametrize(
    ("model", "job", "gigabytes"),
    [
        ("Llama-2 7B", Job(), 16),
        ("Llama-3 8B", Job(seq=1024), 24),
        ("Llama-2 13B", Job(config=MicroAdamConfig(window_size=2, density=0.05)), 32),
        ("Llama-2 7B", Job(engine=Engine.fsdp2, gpus=2), 24),
        ("Llama-2 7B", Job(engine=Engine.zero2, gpus=2, dtype=Dtype.bf16), 80),
    ],
)
def test_proposals_are_the_limits(model: str, job: Job, gigabytes: int) -> None:
    shape, limit = LLAMAS[model], capacity(gigabytes)
    for proposal in propose(shape, job, limit):
        assert proposal.needed == needed(shape, proposal.job)
        assert (proposal.batch >= job.batch) == (proposal.needed <= limit)
        assert needed(shape, proposal.job, batch=proposal.batch + 1) > limit
        if proposal.batch:
            assert needed(shape, proposal.job, batch=proposal.batch) <= limit
        if proposal.seq:
            assert needed(shape, proposal.job, seq=proposal.seq) <= limit
        assert needed(shape, proposal.job, seq=max(1, 2 * proposal.seq)) > limit


def test_fewer_bits_and_activations_in_host_memory_need_less() -> None:
    proposals = propose(LLAMAS["Llama-2 7B"], Job(), capacity(16))
    for on_device, in_host in zip(proposals[::2], proposals[1::2], strict=True):
        assert on_device.state == in_host.state and on_device.peak > in_host.peak
    for more, fewer in zip(proposals, proposals[2:], strict=False):
        assert more.state > fewer.state and more.peak > fewer.peak


def test_a_card_that_is_not_known_has_what_it_is_called() -> None:
    assert capacity(100) == 100 * 2**30
    assert capacity(16) < 16 * 2**30


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    arguments = ["plan", "--model", "7b", "--fit", "16", "--json", str(file)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "what fits a GPU with 16 GB" in result.output and "in host memory" in result.output
    proposals = json.loads(file.read_text())
    assert [proposal["job"]["config"]["ef_bits"] for proposal in proposals[::2]] == [4, 2, 1.6, 1, 0]


def test_a_picture_of_proposals_is_refused() -> None:
    result = CliRunner().invoke(app, ["plan", "--model", "7b", "--fit", "16", "--plot", "plan.png"])
    assert result.exit_code == 1 and "leave one of them out" in result.output
