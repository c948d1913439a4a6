"""What happens to a training, as rules of a Hypothesis state machine; beside it the scalar oracle is stepped.

After every rule each weight, state tensor, step and setting is compared.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor

from microadam_dist import CheckpointMismatchError, MicroAdamConfig
from microadam_dist.backends.cpu import available_isas
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from microadam_dist.errors import BackendUnavailableError
from tests.kernels import cases

from .blocks import assert_same, blocks, dense
from .expected import Expected
from .virtual_ranks import Cut, Group, Saved, Whole, start

MAX_SAVED = 4


def _backends() -> list[str]:
    try:
        return ["cpu", "reference"] if available_isas() else ["reference"]
    except BackendUnavailableError:
        return ["reference"]


# Equal blocks; blocks of two lengths; and later rows of few and of many blocks, whose last one is shorter.
FIRST = [{"square": (64, 64), "bias": (40,)}, {"odd": (41, 100), "thin": (9, 5)}]
LATER = [{"late": (33, 130)}, {"scale": (7,), "last": (4, 1030)}]

STRUCTURES = st.fixed_dictionaries(
    {
        "density": st.sampled_from([0.1, 0.02, 0.5]),
        "block_size": st.sampled_from([64, 128]),
        "bucket_size": st.sampled_from([64, 16]),
    }
)
WINDOWS = st.sampled_from([(1, False), (2, False), (4, False), (4, True), (2, True)])
CHANGES = st.fixed_dictionaries(
    {"lr": st.sampled_from([2.0**-7, 2.0**-5, 0.0, 1e-3])},
    optional={
        "weight_decay": st.sampled_from([0.0, 0.1, 1.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
    },
)
SEEDS = st.integers(0, 2**16)
GRADIENTS = st.sampled_from([cases.ties, cases.recurring, cases.shifted, cases.zeros, cases.tiny])
NOT_FINITE = st.sampled_from([torch.nan, torch.inf, -torch.inf, 2.0**60])
NUMBERS = st.integers(0, 2**16)  # of something, modulo how many there are
SOME = st.lists(NUMBERS, min_size=1, max_size=2)


@st.composite
def group_settings(draw: st.DrawFn) -> dict[str, Any]:
    window_size, packed = draw(WINDOWS)
    defaults = dataclasses.asdict(MicroAdamConfig())
    return {**defaults, **draw(STRUCTURES), **draw(CHANGES), "window_size": window_size, "packed_window": packed}


def is_whole(machine: Training) -> bool:
    return isinstance(machine.run, Whole)


def has_state(machine: Training) -> bool:
    return any(e.step is not None for e in machine.expected.values())


class Training(RuleBasedStateMachine):
    """A training and what is expected of it."""

    cuts: list[Cut] = []
    num_operations = 0

    # ---------------------------------------------------------------- begin, step

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        backend=st.sampled_from(_backends()),
        first=group_settings(),
        second=group_settings(),
        number=NUMBERS,
    )
    def begin(
        self, dtype: torch.dtype, backend: str, first: dict[str, Any], second: dict[str, Any], number: int
    ) -> None:
        self.dtype, self.backend = dtype, backend
        self.folder = Path(tempfile.mkdtemp())
        self.saved: list[tuple[Saved, dict[str, Expected]]] = []
        self.frozen: set[str] = set()
        self.groups: list[Group] = []
        self.expected: dict[str, Expected] = {}
        for shapes, own in zip(FIRST, (first, second), strict=True):
            self.expect(Group(shapes, own))
        cut = self.cuts[number % len(self.cuts)]
        self.note_cut(cut)
        self.run = start(cut, self.initial(self.groups), self.groups, backend)

    def expect(self, group: Group) -> None:
        self.groups.append(group)
        for name, weights in self.initial([group]).items():
            self.expected[name] = Expected(name, group.shapes[name], weights.flatten(), group.config)

    def initial(self, groups: list[Group]) -> dict[str, Tensor]:
        shapes = {name: shape for group in groups for name, shape in group.shapes.items()}
        random = {name: torch.Generator().manual_seed(len(name)) for name in shapes}
        return {name: torch.randn(s, generator=random[name]).to(self.dtype) for name, s in shapes.items()}

    def note_cut(self, cut: Cut) -> None:
        for group in self.groups:
            for name, edge in cut.edges(group):
                self.expected[name].cut_at(edge)

    @property
    def units(self) -> list[list[str]]:
        """What is frozen, or left without a gradient, together: ZeRO steps all that lies in a flat tensor."""
        groups = [list(group.shapes) for group in self.groups]
        return groups if any(cut.kind.startswith("zero") for cut in self.cuts) else [[n] for g in groups for n in g]

    def gradients(self, seed: int, kind: Any = cases.normal, units: list[int] | None = None) -> dict[str, Tensor]:
        """Of all parameters, or those in some units, that are not frozen."""
        chosen = range(len(self.units)) if units is None else [number % len(self.units) for number in units]
        named = {name: self.expected[name] for unit in dict.fromkeys(chosen) for name in self.units[unit]}
        generator = torch.Generator().manual_seed(seed)
        grads = {
            name: kind(generator, e.initial.numel(), seed).view(e.shape).to(self.dtype) for name, e in named.items()
        }
        return {name: grad for name, grad in grads.items() if name not in self.frozen}

    def take(self, grads: dict[str, Tensor]) -> None:
        is_first = not has_state(self) and isinstance(self.run, Whole)
        if is_first and not any(grad.any() for grad in grads.values()):  # a probe for the state, no step
            for name in grads:
                self.expected[name].step = 0
            num_skipped = 0
        else:
            configs = {name: group.config for group in self.groups for name in group.shapes}
            num_skipped = sum(self.expected[name].take(grad, configs[name]) for name, grad in grads.items())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="MicroAdam skipped")
            assert self.run.step(grads) == num_skipped

    @rule(seed=SEEDS, units=SOME)
    def step(self, seed: int, units: list[int]) -> None:
        """The others get no gradient."""
        self.take(self.gradients(seed, cases.normal, units))

    @rule(seed=SEEDS, kind=GRADIENTS, units=SOME)
    def step_with_an_odd_gradient(self, seed: int, kind: Any, units: list[int]) -> None:
        self.take(self.gradients(seed, kind, units))

    @rule(seed=SEEDS, unit=NUMBERS, place=NUMBERS, value=NOT_FINITE)
    def step_with_a_gradient_that_is_not_finite(self, seed: int, unit: int, place: int, value: float) -> None:
        grads = self.gradients(seed, cases.normal, [unit])
        for grad in list(grads.values())[:1]:
            grad.view(-1)[place % grad.numel()] = value
        self.take(grads)

    # ---------------------------------------------------------------- what users change

    @rule(number=NUMBERS, changes=CHANGES, as_tensor=st.booleans())
    def change_settings(self, number: int, changes: dict[str, Any], as_tensor: bool) -> None:
        index = number % len(self.groups)
        self.groups[index].settings.update(changes)
        lr = torch.tensor(changes["lr"], dtype=torch.float64) if as_tensor else changes["lr"]
        self.run.set(index, **{**changes, "lr": lr})

    @rule(number=NUMBERS)
    def freeze(self, number: int) -> None:
        self.frozen |= set(self.units[number % len(self.units)])
        self.set_requires_grad()

    @precondition(lambda self: self.frozen)
    @rule(number=NUMBERS)
    def thaw(self, number: int) -> None:
        frozen = [unit for unit in self.units if self.frozen.issuperset(unit)]
        self.frozen -= set(frozen[number % len(frozen)])
        self.set_requires_grad()

    def set_requires_grad(self) -> None:
        if isinstance(self.run, Whole):
            for name, p in self.run.model.named_parameters():
                p.requires_grad_(name not in self.frozen)

    @precondition(lambda self: len(self.groups) < len(FIRST) + len(LATER))
    @rule(own=group_settings())
    def add_param_group(self, own: dict[str, Any]) -> None:
        group = Group(LATER[len(self.groups) - len(FIRST)], own)
        self.expect(group)
        self.note_cut(self.run.cut)
        self.run.add_group(self.initial([group]), group)

    # ---------------------------------------------------------------- checkpoints

    def folder_for_state(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder)) / "state"

    @rule(apart=st.booleans())
    def save(self, apart: bool) -> None:
        """A state dict, or a file for each rank; or what `save_sharded` writes."""
        has_spans = not self.run.cut.kind.startswith("zero")  # several in a tensor: not for save_sharded
        saved = self.run.save(self.groups, self.folder_for_state() if apart and has_spans else None)
        self.saved = [*self.saved[1 - MAX_SAVED :], (saved, self.copies())]

    def copies(self) -> dict[str, Expected]:
        return {name: e.copy() for name, e in self.expected.items()}

    @precondition(lambda self: self.saved)
    @rule(which=NUMBERS, to=NUMBERS)
    def load_in_a_new_process(self, which: int, to: int) -> None:
        """On any number of ranks."""
        saved, expected = self.saved[which % len(self.saved)]
        self.restart(saved, expected, self.cuts[to % len(self.cuts)])

    @rule(to=NUMBERS)
    def reshard(self, to: int) -> None:
        """Go on with another number of ranks."""
        self.restart(self.run.save(self.groups, None), self.copies(), self.cuts[to % len(self.cuts)])

    def restart(self, saved: Saved, expected: dict[str, Expected], cut: Cut) -> None:
        fresh = [Group(g.shapes, {**g.settings, "lr": 1.0, "weight_decay": 0.5}) for g in saved.groups]
        self.run = start(cut, self.initial(fresh), fresh, self.backend)
        self.set_requires_grad()
        self.resume(saved, expected)

    @precondition(lambda self: self.saved)
    @rule(which=NUMBERS)
    def load_over_what_is_there(self, which: int) -> None:
        """It has more or fewer parameters, or other settings, when groups were added in between."""
        saved, expected = self.saved[which % len(self.saved)]
        pairs = list(zip(saved.groups, self.groups, strict=False))
        differing = [group for group, own in pairs if group.config.structural != own.config.structural]
        has_state = any(expected[name].step is not None for group in differing for name in group.shapes)
        num_more = len(saved.groups) - len(self.groups)
        if not num_more and not differing:
            self.resume(saved, expected)
        # Whether the settings of a parameter that was never stepped are others is known from a state dict only.
        elif has_state or num_more < 0 or (isinstance(self.run, Whole) and saved.folder is None and num_more):
            with self.refused(CheckpointMismatchError):
                self.run.load(saved)

    def resume(self, saved: Saved, expected: dict[str, Expected]) -> None:
        self.run.load(saved)
        self.groups = [group.copy() for group in saved.groups]
        self.expected = {name: e.copy() for name, e in expected.items()}
        self.frozen &= self.expected.keys()
        self.note_cut(self.run.cut)
        self.set_requires_grad()

    @contextmanager
    def refused(self, error: type[Exception]) -> Iterator[None]:
        """It raises, and then everything is as it was: `check` looks after every rule."""
        with pytest.raises(error):
            yield

    # ---------------------------------------------------------------- compare

    @invariant()
    def check(self) -> None:
        type(self).num_operations += 1
        shards = self.run.shards()
        assert self.run.settings() == [group.config for group in self.groups]
        weights = Resharder([SourceShard(s.layout, None, s.weights, s.origin) for s in shards])
        assert weights.shapes == {name: e.shape for name, e in self.expected.items()}
        for name, e in self.expected.items():
            got = weights.whole(name)
            assert got.dtype == self.dtype
            same = got.flatten().float() == torch.from_numpy(e.weights)
            assert bool(same[torch.from_numpy(e.exact)].all()), f"weights of {name}"
        self.check_state([shard for shard in shards if shard.state is not None])

    def check_state(self, shards: list[SourceShard]) -> None:
        steps = {span.fqn: set() for shard in shards for span in shard.layout.spans}
        for shard in shards:
            for span in shard.layout.spans:
                steps[span.fqn].add(int(shard.state["step"]))
        assert steps == {name: {e.step} for name, e in self.expected.items() if e.step is not None}
        moments, got = {}, blocks(shards)
        for e in self.expected.values():
            if e.step is not None:
                moments |= e.moments
                for key, expected in e.blocks.items():
                    assert_same(got[key], expected)
        assert dense([shard for shard in shards if shard.layout.dense_runs]) == moments

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
