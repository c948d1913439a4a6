"""Checkpoints that earlier versions wrote: they load, and the training goes on as it did there, bit for bit.

`tests/checkpoint/fixtures/make.py` made them, on 2 ranks.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from microadam_dist.cli import main as microadam
from tests.checkpoint.trainings import END, ENGINES, SAVED_AT, SHAPES, WRITTEN_BY, Digests, num_differing
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

FIXTURES = Path(__file__).parent / "fixtures" / "v0.1.0"
EXPECTED: dict[str, dict[str, Digests]] = json.loads((FIXTURES / "expected.json").read_text())

RESHARDED = "-resharded"  # by the command line, for 3 ranks
# Ranks -> which checkpoint goes on under which engine.
MOVES = {
    1: [(name, "plain") for name in ("plain", "ddp", "fsdp1", "fsdp2")]
    + [(name, f"zero0-{name.partition('-')[2]}") for name in ENGINES if name.startswith("zero")],
    2: [(name, name) for name in ENGINES if name != "plain"],
    3: [(name, name) for name in ("ddp", "ddp-names-of-wrapper", "fsdp1", "fsdp2")]
    + [(name + form, name) for name in ("zero1-fp32", "zero2-bf16", "zero3-bf16") for form in ("", RESHARDED)],
}
# Shards are cut between rows only, so that every bit is that of one process.
ROWS = {"plain", "ddp", "ddp-names-of-wrapper", "fsdp2", "zero0-fp32", "zero0-bf16"}
Results = dict[tuple[int, str], dict[str, Digests]]


def load_and_train(
    rank: int, world_size: int, folder: Path, moves: list[tuple[str, str]]
) -> dict[str, dict[str, Digests]]:
    """By checkpoint: what there is once it is loaded, and at the end."""
    found = {}
    for source, engine in moves:
        is_elastic = engine.startswith("zero") and world_size != WRITTEN_BY and not source.endswith(RESHARDED)
        training = ENGINES[engine](saved=folder / source, **({"elastic": True} if is_elastic else {}))
        loaded = training.digests()
        training.train(range(SAVED_AT, END))
        found[source] = {"saved": loaded, "end": training.digests()}
        training.close()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One launch of ranks for all moves with as many."""
    folder = tmp_path_factory.mktemp("old")
    for archive in FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as content:
            content.extractall(folder / archive.name.removesuffix(".tar.xz"), filter="data")
    for source, engine in MOVES[3]:
        if source.endswith(RESHARDED):
            reshard(folder / engine, folder / source)
    found: Results = {}
    for world_size, moves in MOVES.items():
        by_rank = run_ranks(load_and_train, world_size, folder, moves)
        assert all(of_rank == by_rank[0] for of_rank in by_rank)
        found |= {(world_size, source): moments for source, moments in by_rank[0].items()}
    return found


def reshard(source: Path, target: Path) -> None:
    arguments = ["microadam", "reshard", str(source), str(target), "--world-size", "3"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments)
        microadam()
    assert ended.value.code == 0


@pytest.mark.parametrize("name", [source for source, _ in MOVES[2]])
def test_as_many_ranks_go_on_with_every_bit(name: str, results: Results) -> None:
    assert_same(results[2, name], EXPECTED[name])


def assert_same(got: dict[str, Digests], expected: dict[str, Digests]) -> None:
    for moment, tensors in expected.items():
        names = got[moment].keys() | tensors.keys()
        differing = [name for name in names if got[moment].get(name) != tensors.get(name)]
        assert not differing, (moment, sorted(differing))


@pytest.mark.parametrize("world_size, source, engine", [(n, *move) for n in (1, 3) for move in MOVES[n]])
def test_other_ranks_go_on_with_the_bits_of_one(world_size: int, source: str, engine: str, results: Results) -> None:
    got, written = results[world_size, source], EXPECTED[source.removesuffix(RESHARDED)]
    of_one_process = EXPECTED["zero0-bf16" if "bf16" in source else "plain"]
    for name in [f"{name}.weight" for name in SHAPES]:
        assert got["saved"][name] == written["saved"][name]  # in cut blocks, too
        assert name in got["end"]
    for moment, expected in of_one_process.items():
        if engine in ROWS:  # the state, too, is whole there
            assert got[moment].keys() == expected.keys()
        for name in got[moment].keys() & expected.keys():
            is_cut = source not in ROWS and len(expected[name].split()) > 1  # not vectors and steps
            most = num_cut_rows(world_size) if is_cut else 0
            assert num_differing(got[moment][name], expected[name]) <= most, (moment, name)


def num_cut_rows(world_size: int) -> int:
    """The most rows of a matrix that have a cut block, on the ranks that wrote it or on these."""
    return WRITTEN_BY - 1 + world_size - 1


@pytest.mark.parametrize("name", [engine for source, engine in MOVES[3] if source.endswith(RESHARDED)])
def test_resharded_files_give_what_elastic_loading_gives(name: str, results: Results) -> None:
    assert_same(results[3, name + RESHARDED], results[3, name])
