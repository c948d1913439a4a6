"""Whatever happens to a training, in any order: its bits are the scalar oracle's, and what is refused changes nothing.

Hypothesis draws the operations.
"""

from __future__ import annotations

import copy
import os
import shutil
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

from microadam_dist import CheckpointMismatchError, ConfigError, MicroAdam
from microadam_dist.checkpoint.reshard import Resharder, SourceShard
from tests.amount import amount

from .operations import NUMBERS, SEEDS, Training, has_state, is_whole
from .virtual_ranks import Cut, Saved, Whole

NUM_OPERATIONS = amount(5000)
STEPS_OF_AN_EXAMPLE = 50
OPTIONS = settings(stateful_step_count=STEPS_OF_AN_EXAMPLE, deadline=None, suppress_health_check=list(HealthCheck))


class Machine(Training):
    """And what users try that cannot be."""

    @precondition(is_whole)
    @rule(
        change=st.sampled_from(["optimizer", "model", "groups", "format", "density", "ef_bits", "cut off", "emptied"]),
        number=NUMBERS,
        which=NUMBERS,
    )
    def load_what_does_not_fit(self, change: str, number: int, which: int) -> None:
        assert isinstance(self.run, Whole)
        state_dict = copy.deepcopy(self.run.optimizer.state_dict())
        groups, states = state_dict["param_groups"], state_dict["state"]
        if change == "optimizer":
            state_dict = torch.optim.AdamW(self.run.optimizer.param_groups[0]["params"]).state_dict()
        elif change == "model":
            state_dict = self.of_another_model()
        elif change == "groups":
            del groups[number % len(groups)]
        elif change == "format":
            state_dict["microadam"]["format"] = 0
        elif change == "density":
            groups[number % len(groups)][change] = 0.25
        elif change == "ef_bits":
            groups[number % len(groups)][change] = 8
        elif states:
            state = states[sorted(states)[number % len(states)]]
            names = sorted(name for name in state if name != "step")
            name = names[which % len(names)]
            state[name] = state[name][..., :-1] if change == "cut off" else state[name][:0]
        else:
            state_dict["state"][0] = {"step": torch.tensor(1)}
        with self.refused(CheckpointMismatchError):
            self.run.optimizer.load_state_dict(state_dict)

    def of_another_model(self) -> dict[str, Any]:
        """With as many parameters and elements in the same groups, of other shapes."""
        params = [[torch.nn.Parameter(torch.ones(*s[1:], s[0], 1)) for s in g.shapes.values()] for g in self.groups]
        own = [{**group.settings, "params": members} for group, members in zip(self.groups, params, strict=True)]
        optimizer = MicroAdam(own, backend=self.backend)
        for p in [p for members in params for p in members]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer.state_dict()

    @precondition(lambda self: any(saved.folder for saved, _ in self.saved))
    @rule(which=NUMBERS, cut_off=st.booleans())
    def load_a_folder_that_is_damaged(self, which: int, cut_off: bool) -> None:
        folders = [saved for saved, _ in self.saved if saved.folder is not None]
        saved = folders[which % len(folders)]
        assert saved.folder is not None
        damaged = shutil.copytree(saved.folder, self.folder_for_state())
        (part,) = damaged.glob("*.distcp")
        if cut_off:
            os.truncate(part, part.stat().st_size // 2)
        else:
            part.unlink()
        with self.refused(CheckpointMismatchError):
            self.run.load(Saved(saved.cut, saved.groups, saved.weights, [], damaged))

    @precondition(has_state)
    @rule(number=NUMBERS, change=st.sampled_from(["missing", "differing copy"]))
    def reshard_what_does_not_fit(self, number: int, change: str) -> None:
        sources = self.run.shards()
        held = [s for s in sources if s.layout.spans and sum(span.numel for span in s.layout.spans)]
        one = held[number % len(held)]
        if change == "missing":
            sources = [source for source in sources if source is not one]
        else:
            sources.append(SourceShard(one.layout, one.state, one.weights + 1, "another checkpoint"))
        with self.refused(CheckpointMismatchError):
            Resharder(sources).states([source.layout for source in self.run.shards()])

    @precondition(lambda self: is_whole(self) and self.stepped_groups())
    @rule(
        seed=SEEDS,
        number=NUMBERS,
        change=st.sampled_from([("density", 0.25), ("bucket_size", 32), ("block_size", 256)]),
    )
    def change_what_cannot_change(self, seed: int, number: int, change: tuple[str, Any]) -> None:
        indices = self.stepped_groups()
        self.refuse_step(seed, indices[number % len(indices)], *change)

    @precondition(is_whole)
    @rule(seed=SEEDS, number=NUMBERS, lr=st.sampled_from([-1e-3, torch.nan, torch.inf]))
    def change_lr_to_what_is_none(self, seed: int, number: int, lr: float) -> None:
        self.refuse_step(seed, number % len(self.groups), "lr", lr)

    def refuse_step(self, seed: int, index: int, name: str, value: Any) -> None:
        assert isinstance(self.run, Whole)
        before = self.run.optimizer.param_groups[index][name]
        self.run.set(index, **{name: value})
        with self.refused(ConfigError):
            self.run.step(self.gradients(seed))
        self.run.set(index, **{name: before})

    def stepped_groups(self) -> list[int]:
        """Those in which a parameter has state, and this or another one gets a gradient."""
        stepped = {name for name, e in self.expected.items() if e.step is not None}
        return [
            index
            for index, group in enumerate(self.groups)
            if not stepped.isdisjoint(group.shapes) and not self.frozen.issuperset(group.shapes)
        ]

    @precondition(is_whole)
    @rule(change=st.sampled_from([{"lr": -1.0}, {"density": 0.0}, {"densty": 0.1}, {"packed_window": 1}]))
    def add_a_group_that_is_none(self, change: dict[str, Any]) -> None:
        assert isinstance(self.run, Whole)
        with self.refused(ConfigError):
            self.run.optimizer.add_param_group({"params": [("x", torch.nn.Parameter(torch.ones(64, 64)))], **change})


class WholeBlocks(Machine):
    """Ranks hold whole rows: nothing is cut."""

    cuts = [Cut("whole"), Cut("rows", 2), Cut("whole"), Cut("rows", 3), Cut("whole"), Cut("rows", 5)]


class CutBlocks(Machine):
    """ZeRO: the few blocks that an edge cuts are left out from then on."""

    cuts = [Cut("whole"), Cut("zero1", 2), Cut("zero3", 2), Cut("zero3", 3), Cut("rows", 2)]


@pytest.mark.timeout(max(600, NUM_OPERATIONS))
@pytest.mark.parametrize("machine", [WholeBlocks, CutBlocks])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_operation_leaves_what_the_oracle_has(machine: type[Machine]) -> None:
    machine.num_operations = 0
    # Hypothesis ends an example early when it has drawn much.
    while (missing := NUM_OPERATIONS // 2 - machine.num_operations) > 0:
        num_examples = -(-missing // STEPS_OF_AN_EXAMPLE)
        run_state_machine_as_test(machine, settings=settings(OPTIONS, max_examples=num_examples))
    print(f"{machine.num_operations} operations")
