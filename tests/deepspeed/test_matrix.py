"""Every combination of the matrix: a sharded engine steps as one process does with the same reduced gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from microadam_dist import ConfigError, MicroAdam
from microadam_dist.config import SETTING_NAMES
from tests.deepspeed.cuts import cut_intervals, uncut_masks
from tests.deepspeed.engines import GivenGradients, base_optimizer
from tests.deepspeed.matrix import TORCH_DTYPES, Row, make_engine, markdown, require_dtype, rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.deepspeed
NUM_STEPS = 4


@dataclass
class Interval:
    """Part of one parameter on one rank."""

    fqn: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass
class Record:
    """What happened on one rank: weights before and after, gradients by step, settings by parameter, fragments."""

    before: list[Interval]
    after: list[Interval]
    gradients: list[list[Interval]]
    settings: dict[str, dict[str, Any]]
    cuts: list[tuple[str, int, int]]


def intervals(optimizer: MicroAdam, tensor: Tensor, values: Tensor) -> list[Interval]:
    flat = values.detach().flatten()
    return [
        Interval(s.fqn, s.global_shape, s.start, flat[s.offset : s.offset + s.numel].clone())
        for s in optimizer.sharded.layouts()[tensor].spans
    ]


def run_row(row: Row, rank: int) -> Record:
    """Train the row's engine and write down what its optimizer sees and does."""
    engine = make_engine(row)
    optimizer = base_optimizer(engine)
    record = Record([], [], [], {}, [])
    after: dict[Tensor, list[Interval]] = {}
    original_step = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in after:
                    record.before += intervals(optimizer, p, p)
                record.gradients[-1] += intervals(optimizer, p, p.grad)
                for interval in intervals(optimizer, p, p):
                    record.settings[interval.fqn] = {key: group[key] for key in SETTING_NAMES}
        result = original_step(*args, **kwargs)
        for group in optimizer.param_groups:
            after.update({p: intervals(optimizer, p, p) for p in group["params"] if p.grad is not None})
        return result

    optimizer.step = step
    generator = torch.Generator().manual_seed(rank)  # every rank has gradients of its own
    dtype = torch.bfloat16 if "pre-cast" in row.feature.traits else TORCH_DTYPES[row.dtype]
    for number in range(NUM_STEPS):
        record.gradients.append([])
        for _ in range(row.feature.config.get("gradient_accumulation_steps", 1)):
            grads = {n: torch.randn(s, generator=generator).to(dtype) for n, s in GivenGradients.SHAPES.items()}
            if "missing gradients" in row.feature.traits and number % 2:
                del grads["down"], grads["norm"]
            engine.backward(engine(grads))
            engine.step()
    record.after = [interval for found in after.values() for interval in found]
    record.cuts = cut_intervals(optimizer.sharded._layouts.values())
    engine.destroy()
    return record


def _run_rows(rank: int, world_size: int, dtype: str) -> list[Any]:
    results: list[Any] = []
    for row in rows():
        if row.dtype != dtype:
            continue
        try:
            mine: Record | str = run_row(row, rank)
        except ConfigError as error:
            if row.feature.error is None:
                raise
            mine = str(error)
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, mine)
        results.append(gathered if rank == 0 else None)
    return results


@pytest.fixture(scope="module")
def records() -> Callable[[str], dict[str, list[Any]]]:
    """What happened on the ranks, in every row of a dtype; its ranks run once."""

    @functools.cache
    def of(dtype: str) -> dict[str, list[Any]]:
        require_dtype(dtype)
        names = [str(row) for row in rows() if row.dtype == dtype]
        return dict(zip(names, run_ranks(_run_rows, 2, dtype)[0], strict=True))

    return of


def assemble(parts: list[Interval]) -> dict[str, Tensor]:
    """Whole parameters from the intervals of all ranks."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        if part.fqn not in whole:
            whole[part.fqn] = torch.zeros(part.shape, dtype=part.values.dtype)
        whole[part.fqn].view(-1)[part.start : part.start + part.values.numel()] = part.values
    return whole


def replay(ranks: list[Record]) -> dict[str, Tensor]:
    """One process, the same initial weights and reduced gradients."""
    weights = assemble([part for record in ranks for part in record.before])
    params = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    settings = {name: chosen for record in ranks for name, chosen in record.settings.items()}
    optimizer = MicroAdam([{"params": [param], **settings[name]} for name, param in params.items()])
    for step in range(NUM_STEPS):
        gradients = assemble([part for record in ranks for part in record.gradients[step]])
        for name, param in params.items():
            param.grad = gradients.get(name)
        optimizer.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("row", list(rows()), ids=str)
def test_row(row: Row, records: Callable[[str], dict[str, list[Any]]]) -> None:
    ranks = records(row.dtype)[str(row)]
    if row.feature.error is not None:
        assert all(isinstance(message, str) and row.feature.error in message for message in ranks)
        return
    expected = replay(ranks)
    got = assemble([part for record in ranks for part in record.after])
    assert got.keys() == expected.keys()
    uncut = uncut_masks(expected, {cut for record in ranks for cut in record.cuts}, suffix="")
    for name, weight in got.items():
        mask = uncut[name]
        assert torch.equal(weight.flatten()[mask], expected[name].flatten()[mask]), name
        assert mask.sum() > 0.9 * mask.numel()


def test_the_documented_table_is_this_one() -> None:
    page = Path(__file__).parents[2] / "configs" / "deepspeed" / "MATRIX.md"
    assert page.read_text() == markdown(), f"run: python -m tests.deepspeed.matrix > {page.relative_to(Path.cwd())}"
