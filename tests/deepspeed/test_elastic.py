"""Checkpoints of W ranks and one stage, resumed on W' ranks and another stage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import microadam_dist
from microadam_dist import CheckpointMismatchError
from microadam_dist.arithmetic.state import flatten_state
from microadam_dist.checkpoint.deepspeed import read_checkpoint
from microadam_dist.checkpoint.reshard import SourceShard
from tests.checkpoint.blocks import assert_same, blocks, dense
from tests.deepspeed.cuts import cut_intervals, plain_weights, uncut_masks
from tests.deepspeed.engines import (
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
SAVED_AT, END = 7, 12


def new_engine(stage: int, dtype: torch.dtype, **extra: Any) -> Any:
    return initialize(make_model(), make_config(stage, dtype, **extra))


def _save(rank: int, world_size: int, folder: str, sources: list[tuple[int, str]]) -> None:
    for stage, dtype_name in sources:
        engine = new_engine(stage, getattr(torch, dtype_name))
        train(engine, make_gradients(END, getattr(torch, dtype_name))[:SAVED_AT])
        engine.save_checkpoint(os.path.join(folder, f"{stage}-{dtype_name}"), client_state={"epoch": 3})
        engine.destroy()


SOURCES = [(stage, dtype) for stage in (0, 2, 3) for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved-by-2-ranks")
    run_ranks(_save, 2, str(folder), SOURCES)
    return folder


def _resume(rank: int, world_size: int, folder: str, moves: list[tuple[int, int, str]]) -> list[Any]:
    results = []
    for source_stage, stage, dtype_name in moves:
        dtype = getattr(torch, dtype_name)
        engine = new_engine(stage, dtype)
        _, client_state = microadam_dist.deepspeed.load_checkpoint(engine, f"{folder}/{source_stage}-{dtype_name}")
        assert client_state == {"epoch": 3}
        assert engine.global_steps == SAVED_AT
        optimizer = base_optimizer(engine)
        loaded = [
            SourceShard(layout, flatten_state(optimizer.state[p]), p.detach().flatten().clone(), "")
            for p, layout in optimizer.sharded._layouts.items()
        ]
        state = {name: {n: t.clone() for n, t in block.items()} for name, block in blocks(loaded).items()}
        moments, weights_then = dense(loaded), full_weights(engine)
        train(engine, make_gradients(END, dtype)[SAVED_AT:])
        gathered: list[Any] = [None] * world_size
        cuts = cut_intervals(optimizer.sharded._layouts.values())
        dist.all_gather_object(gathered, (state, moments, cuts))
        results.append((weights_then, full_weights(engine), gathered))
        engine.destroy()
    return results


# 2 -> 1, 2, 3, 4 ranks, and from every stage to every other one
MOVES = {
    1: [(2, 2, "bfloat16"), (3, 1, "float32"), (0, 3, "float32")],
    2: [(2, 2, "float32"), (2, 3, "bfloat16"), (3, 2, "bfloat16"), (0, 2, "bfloat16"), (3, 0, "bfloat16")],
    3: [(2, 2, "float32"), (3, 3, "bfloat16"), (2, 0, "float32")],
    4: [(2, 2, "bfloat16"), (2, 3, "float32"), (3, 3, "float32"), (3, 1, "bfloat16"), (0, 2, "float32")],
}


@pytest.mark.parametrize("world_size", MOVES)
def test_resume_on_other_ranks_and_stages(world_size: int, saved: Path) -> None:
    all_results = run_ranks(_resume, world_size, str(saved), MOVES[world_size])
    for index, (source_stage, stage, dtype_name) in enumerate(MOVES[world_size]):
        checkpoint = read_checkpoint(saved / f"{source_stage}-{dtype_name}")
        source = [shard for shards in checkpoint.shards for shard in shards]
        weights_then, weights_end, gathered = all_results[0][index]
        move = f"ZeRO-{source_stage} on 2 -> ZeRO-{stage} on {world_size}, {dtype_name}"

        # Everything is where it was: weights and moments exactly, blocks unless they are cut in another way.
        for name, weight in saved_weights(source, getattr(torch, dtype_name)).items():
            assert torch.equal(weights_then[name.removesuffix(".weight")].flatten(), weight), f"{move}: {name}"
        theirs = blocks(source)
        ours = {key: block for state, _, _ in gathered for key, block in state.items()}
        assert {k: v for _, moments, _ in gathered for k, v in moments.items()} == dense(source)
        for key in theirs.keys() & ours.keys():
            assert_same(ours[key], theirs[key])

        # And the training goes on as if nothing had happened, in all blocks that are cut on neither side (a mean over
        # 3 ranks is not exact in bf16).
        cuts = {*cut_intervals(shard.layout for shard in source), *(cut for _, _, cuts in gathered for cut in cuts)}
        assert set(ours.keys() ^ theirs.keys()) <= cuts | whole_blocks_of(cuts, ours | theirs)
        expected = plain_weights(getattr(torch, dtype_name), END)
        never_cut = uncut_masks(expected, cuts)
        for rank_results in all_results if world_size != 3 or dtype_name == "float32" else []:
            for name, weight in rank_results[index][1].items():
                mask = never_cut[name]
                assert torch.equal(weight.flatten()[mask], expected[name].flatten()[mask]), f"{move}: {name}"
        share = 1 - sum(int(mask.sum()) for mask in never_cut.values()) / sum(m.numel() for m in never_cut.values())
        print(f"{move}: {len(ours.keys() - theirs.keys())} rebuilt blocks, {share:.1%} of weights in a block ever cut")


def whole_blocks_of(cuts: set[tuple[str, int, int]], keys: Iterable[tuple[str, int, int]]) -> set[tuple[str, int, int]]:
    """The blocks that some cut interval lies in."""
    return {
        (fqn, start, numel)
        for fqn, start, numel in keys
        for cut_fqn, cut_start, cut_numel in cuts
        if fqn == cut_fqn and start <= cut_start and cut_start + cut_numel <= start + numel
    }


def saved_weights(source: list[SourceShard], dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {span.fqn: torch.zeros(span.global_numel, dtype=dtype) for shard in source for span in shard.layout.spans}
    for shard in source:
        for span in shard.layout.spans:
            part = shard.weights[span.offset : span.offset + span.numel]
            weights[span.fqn][span.start : span.start + span.numel] = part.to(dtype)
    return weights


@pytest.mark.parametrize("damage", ["missing file", "truncated file", "foreign file", "no checkpoint", "other model"])
def test_damage_is_named_on_every_rank_and_changes_nothing(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved / "2-bfloat16", folder)
    victim = folder / f"global_step{SAVED_AT}" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    expected = victim.name
    if damage == "missing file":
        victim.unlink()
        expected = "written by 2 ranks and has 1 files"
    elif damage == "truncated file":
        victim.write_bytes(victim.read_bytes()[:-2000])
    elif damage == "foreign file":
        torch.save({"optimizer_state_dict": {"base_optimizer_state": {}, "fp32_flat_groups": []}}, victim)
    elif damage == "no checkpoint":
        (folder / "latest").unlink()
        expected = "latest is missing"
    elif damage == "other model":
        expected = "'down.weight'"
    for message in run_ranks(_fail_to_resume, 2, str(folder), damage == "other model"):
        assert expected in message


def _fail_to_resume(rank: int, world_size: int, folder: str, other_model: bool) -> str:
    model = make_model()
    if other_model:
        model.down = type(model.down)(96, 100)
    engine = initialize(model, make_config(3, torch.bfloat16))
    gradients = make_gradients(2, torch.bfloat16)
    if other_model:
        for grads in gradients:
            grads["down"] = torch.ones(96, 100, dtype=torch.bfloat16)
    train(engine, gradients)
    optimizer = base_optimizer(engine)
    (before,) = [dict(state) for state in optimizer.state.values()]
    weights = full_weights(engine)
    with pytest.raises(CheckpointMismatchError) as error:
        microadam_dist.deepspeed.load_checkpoint(engine, folder)
    (after,) = [dict(state) for state in optimizer.state.values()]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(weight, full_weights(engine)[name]) for name, weight in weights.items())
    return str(error.value)
