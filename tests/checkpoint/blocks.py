"""State block after block, whatever the shards, to be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from microadam_dist.checkpoint.reshard import SourceShard
from microadam_dist.layout import ERROR_TENSORS, WINDOW_TENSORS


def blocks(shards: list[SourceShard]) -> dict[tuple[str, int, int], dict[str, Tensor]]:
    """Every block's own state, by (parameter, global start, length), read through the runs of the layout."""
    found = {}
    for shard in shards:
        for run in shard.layout.runs:
            for row in range(run.rows):
                for col in range(run.cols):
                    place = run.elements.start + row * run.elements.row_stride + col * run.numel
                    span = next(s for s in shard.layout.spans if s.offset <= place < s.offset + s.numel)
                    state = {"weights": shard.weights[place : place + run.numel]}
                    slots = shard.layout.config.window_size
                    for name, extent, width in (
                        ("codes", run.codes, 1),
                        *((name, run.buckets, 1) for name in ERROR_TENSORS[1:]),
                        *((name, getattr(run, name), slots) for name in WINDOW_TENSORS),
                    ):
                        if name in shard.state:
                            first = width * (extent.start + row * extent.row_stride + col * extent.size)
                            state[name] = shard.state[name][first : first + width * extent.size]
                    found[span.fqn, span.start + place - span.offset, run.numel] = state
    return found


def dense(shards: list[SourceShard]) -> dict[tuple[str, str, int], float]:
    return {
        (name, span.fqn, span.start + i): float(shard.state[name][run.state_start + i])
        for shard in shards
        for run, span in zip(shard.layout.dense_runs, (s for s in shard.layout.spans if s.is_dense), strict=True)
        for i in range(run.numel)
        for name in ("exp_avg", "exp_avg_sq")
    }


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
