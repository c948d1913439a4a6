"""What a parameter and its state must be: the scalar oracle beside it, and its blocks as the package stores them."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from microadam_dist import MicroAdamConfig
from tests.kernels.oracle import Block, ScalarMicroAdam

Key = tuple[str, int, int]  # parameter, start and length of a block


@dataclass
class Expected:
    """One parameter, stepped number by number.

    Attributes:
        initial: (numel,) weights it begins with.
        structure: The settings that decide the shapes of its state.
        weights: (numel,) fp32, the weights now.
        step: Steps so far; None while it has no state.
        exact: (numel,) bool; False where a block has been cut by a shard edge, so that the oracle says nothing of it.
    """

    name: str
    shape: tuple[int, ...]
    initial: Tensor
    structure: MicroAdamConfig
    step: int | None = None
    _blocks: dict[Key, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype, numel = self.initial.dtype, math.prod(self.shape)
        self.weights = self.initial.float().numpy().copy()
        self.exact = np.ones(numel, bool)
        spans = [(self.shape, 0, numel, 0)]
        self._oracle = ScalarMicroAdam(spans, self.structure, str(self.dtype).removeprefix("torch."))

    def copy(self) -> Expected:
        """As it is now. The oracle replaces lists and changes arrays and dictionaries in place, so these are copied."""
        twin = copy.copy(self)
        twin.weights, twin.exact = self.weights.copy(), self.exact.copy()
        twin._oracle = copy.copy(self._oracle)
        twin._oracle.m, twin._oracle.v = dict(self._oracle.m), dict(self._oracle.v)
        twin._oracle.blocks = [
            replace(b, slots=dict(b.slots), codes_of=dict(b.codes_of), scale_of=dict(b.scale_of))
            for b in self._oracle.blocks
        ]
        return twin

    def take(self, grad: Tensor, config: MicroAdamConfig) -> int:
        """One step with this gradient; returns the number of skipped blocks."""
        self._oracle.s = config
        step, self.step = self.step or 0, (self.step or 0) + 1
        self._blocks = {}
        return self._oracle.step(self.weights, grad.flatten().float().numpy(), step, 1.0)

    def cut_at(self, position: int) -> None:
        """A shard edge lies before this element: inside a block, that block follows rules of its own from now on."""
        for block in self._oracle.blocks:
            if block.places[0] < position <= block.places[-1]:
                self.exact[block.places] = False

    @property
    def blocks(self) -> dict[Key, dict[str, Tensor]]:
        """Weights and state of the exact blocks, as `tests.checkpoint.blocks.blocks` finds them."""
        if not self._blocks:
            self._blocks = {(self.name, b.places[0], len(b.places)): self._stored(b) for b in self._oracle.blocks}
        return {key: stored for key, stored in self._blocks.items() if self.exact[key[1]]}

    @property
    def moments(self) -> dict[tuple[str, str, int], float]:
        """Of a parameter on the dense path, as `tests.checkpoint.blocks.dense` finds them."""
        found = {"exp_avg": self._oracle.m, "exp_avg_sq": self._oracle.v}
        return {(key, self.name, i): float(x) for key, moment in found.items() for i, x in moment.items()}

    def _stored(self, block: Block) -> dict[str, Tensor]:
        s, num_kept = self.structure, self.structure.num_kept(len(block.places))
        stored = {"weights": torch.from_numpy(self.weights[block.places]).to(self.dtype)}
        if s.ef_bits:
            stored["codes"] = _pack([code for bucket in block.buckets for code in bucket.codes], s.ef_bits)
            for name in block.buckets[0].stored:
                stored[name] = _bf16([bucket.stored[name] for bucket in block.buckets])
        if s.window_size == 1:
            return stored
        nothing = [(0, np.float32(0))] * num_kept
        slots = [block.slots.get(slot, nothing) for slot in range(s.window_size)]
        bits = 12 if s.packed_window else 16
        stored["indices"] = torch.cat([_pack([index for index, _ in slot], bits) for slot in slots])
        if s.packed_window:
            codes = [block.codes_of.get(slot, [0] * num_kept) for slot in range(s.window_size)]
            stored["values"] = torch.tensor(codes, dtype=torch.int8).view(torch.uint8).flatten()
            stored["scales"] = _bf16([block.scale_of.get(slot, np.float32(0)) for slot in range(s.window_size)])
        else:
            stored["values"] = _bf16([value for slot in slots for _, value in slot])
        return stored


def _bf16(numbers: list[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.float32)).bfloat16()


def _pack(numbers: list[int], bits: int) -> Tensor:
    """One after the other in as few bytes as hold them, the first in the lowest bits."""
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    return torch.frombuffer(bytearray(whole.to_bytes(-(-bits * len(numbers) // 8), "little")), dtype=torch.uint8)
