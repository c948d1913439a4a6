"""Checkpoints that earlier versions wrote: they load, and the training goes on as it did there, bit for bit.

`tests/checkpoint/fixtures/make.py` made them, on 2 ranks ("plain": in one process).
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
Results = dict[str, dict[str, Digests]]  # by checkpoint: once it is loaded ("saved"), and at the end ("end")


def load_and_train(rank: int, world_size: int, folder: Path, moves: list[tuple[str, str]]) -> Results:
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    for archive in FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as content:
            content.extractall(folder / archive.name.removesuffix(".tar.xz"), filter="data")
    return folder


@pytest.fixture(scope="module")
def on_one_rank(folder: Path) -> Results:
    return launch(1, folder)


@pytest.fixture(scope="module")
def on_two_ranks(folder: Path) -> Results:
    return launch(2, folder)


@pytest.fixture(scope="module")
def on_three_ranks(folder: Path) -> Results:
    for source, engine in MOVES[3]:
        if source.endswith(RESHARDED):
            reshard(folder / engine, folder / source)
    return launch(3, folder)


def launch(world_size: int, folder: Path) -> Results:
    by_rank = run_ranks(load_and_train, world_size, folder, MOVES[world_size])
    assert all(of_rank == by_rank[0] for of_rank in by_rank)
    return by_rank[0]


def reshard(source: Path, target: Path) -> None:
    arguments = ["microadam", "reshard", str(source), str(target), "--world-size", "3"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", arguments)
        microadam()
    assert ended.value.code == 0


@pytest.mark.parametrize("name", [source for source, _ in MOVES[2]])
def test_as_many_ranks_go_on_with_every_bit(name: str, on_two_ranks: Results) -> None:
    assert_same(on_two_ranks[name], EXPECTED[name])


@pytest.mark.parametrize("source, engine", MOVES[1])
def test_one_rank_goes_on(source: str, engine: str, on_one_rank: Results) -> None:
    assert_same_but_in_cut_rows(on_one_rank[source], source, engine, num_cuts=1)


@pytest.mark.parametrize("source, engine", MOVES[3])
def test_three_ranks_go_on(source: str, engine: str, on_three_ranks: Results) -> None:
    assert_same_but_in_cut_rows(on_three_ranks[source], source, engine, num_cuts=1 + 2)


@pytest.mark.parametrize("name", [engine for source, engine in MOVES[3] if source.endswith(RESHARDED)])
def test_resharded_files_give_what_elastic_loading_gives(name: str, on_three_ranks: Results) -> None:
    assert_same(on_three_ranks[name + RESHARDED], on_three_ranks[name])


def assert_same(got: dict[str, Digests], expected: dict[str, Digests]) -> None:
    for moment, tensors in expected.items():
        names = got[moment].keys() | tensors.keys()
        differing = [name for name in names if got[moment].get(name) != tensors.get(name)]
        assert not differing, (moment, sorted(differing))


def assert_same_but_in_cut_rows(got: dict[str, Digests], source: str, engine: str, num_cuts: int) -> None:
    """Weights come exactly; then all is as in one process but for the rows of a matrix with a block that ranks cut.

    Args:
        num_cuts: Edges between the ranks that wrote it, and between these: each lies in one row of a matrix.
    """
    written = EXPECTED[source.removesuffix(RESHARDED)]
    of_one_process = EXPECTED["zero0-bf16" if "bf16" in source else "plain"]
    for name in [f"{name}.weight" for name in SHAPES]:
        assert got["saved"][name] == written["saved"][name]
        assert name in got["end"]
    for moment, expected in of_one_process.items():
        if engine in ROWS:  # the state, too, is whole there
            assert got[moment].keys() == expected.keys()
        for name in got[moment].keys() & expected.keys():
            is_cut = source not in ROWS and len(expected[name].split()) > 1  # not vectors and steps
            assert num_differing(got[moment][name], expected[name]) <= is_cut * num_cuts, (moment, name)
