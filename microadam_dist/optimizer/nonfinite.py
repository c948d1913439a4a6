"""Counts the blocks that were skipped because of a NaN or an Inf, and warns of the first ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MAX_PENDING = 1024  # counts kept for a step that does not end


class NonfiniteCounter:
    """Counts made on a device stay there: counting never waits for it, so the warning may come some steps later."""

    def __init__(self) -> None:
        self._on_host = 0
        self._pending: dict[torch.device, list[Tensor]] = {}  # to be added together, which is one kernel
        self._on_device: dict[torch.device, Tensor] = {}
        self._seen: dict[torch.device, Tensor] = {}  # copies of these in host memory, complete or a little old
        self._has_warned = False

    @property
    def total(self) -> int:
        """Skipped blocks so far; waits for the devices."""
        self._add_pending()
        return self._on_host + sum(int(count) for count in self._on_device.values())

    def add_part(self, count: int | Tensor) -> None:
        """Add what a backend returned for a part of a step; what lies on a device when the step ends."""
        if not isinstance(count, Tensor):
            self.add([count])
            return
        pending = self._pending.setdefault(count.device, [])
        pending.append(count)
        if len(pending) == MAX_PENDING:
            self.add([])

    def add(self, counts: Iterable[int | Tensor]) -> None:
        """Add what the backends returned for a step. To be called by a ``step`` of the optimizer."""
        for count in counts:
            if isinstance(count, Tensor):
                self._pending.setdefault(count.device, []).append(count)
            else:
                self._on_host += count
        self._add_pending()
        known = self._on_host + sum(int(seen) for seen in self._seen.values())
        if known and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"MicroAdam skipped {known} blocks whose gradient or error feedback is not finite (NaN, Inf or "
                "above 2**60); their weights and state are unchanged. Further ones are only counted, in "
                "optimizer.num_nonfinite_blocks. If they keep coming, check the loss or clip the gradients.",
                stacklevel=5,  # past torch's wrappers of step(), to the training loop
            )

    def _add_pending(self) -> None:
        while self._pending:
            device, counts = self._pending.popitem()
            if device not in self._on_device:
                self._on_device[device] = torch.zeros((), dtype=torch.int64, device=device)
                self._seen[device] = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
            self._on_device[device] += counts[0] if len(counts) == 1 else torch.stack(counts).sum()
            if not self._has_warned:
                self._seen[device].copy_(self._on_device[device], non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        return {"_on_host": self.total, "_pending": {}, "_on_device": {}, "_seen": {}, "_has_warned": self._has_warned}
