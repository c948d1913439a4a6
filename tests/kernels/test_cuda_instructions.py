"""How many instructions and barriers the kernel executes, counted without a GPU."""

from __future__ import annotations

import pytest
import torch

from microadam_dist.arithmetic.state import allocate_state
from microadam_dist.backends import nvrtc
from microadam_dist.backends.base import TensorStep
from microadam_dist.backends.reference import ReferenceBackend
from microadam_dist.config import MicroAdamConfig
from microadam_dist.errors import BackendUnavailableError
from microadam_dist.layout import ShardSpan, StateLayout

from .cases import BF16
from .instructions import CountingBackend, disassembler

try:
    nvrtc.nvrtc_version()
except BackendUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)
if disassembler() is None:
    pytest.skip("nvidia-cuda-nvdisasm is not installed", allow_module_level=True)

DEFAULT, MORE_KEPT, PAPER = (1, 0.1), (2, 0.05), (10, 0.01)

# (window, density), what else is set, and the most instructions an element.
LIMITS = [
    (DEFAULT, {}, 50),
    (MORE_KEPT, {}, 63),
    (PAPER, {}, 67),
    (PAPER, {"packed_window": True}, 82),
    (DEFAULT, {"rounding": "stochastic"}, 56.2),
    (PAPER, {"rounding": "stochastic"}, 73),
    (DEFAULT, {"ef_bits": 0}, 36.5),
    (DEFAULT, {"ef_bits": 1}, 53),
    (DEFAULT, {"ef_bits": 1.6}, 59.5),
    (DEFAULT, {"ef_bits": 2}, 50.5),
    (DEFAULT, {"ef_bits": 8}, 51),
]


def aligned(numel: int, dtype: torch.dtype) -> torch.Tensor:
    storage = torch.zeros(numel + 8, dtype=dtype)
    return storage[-storage.data_ptr() % 16 // storage.element_size() :][:numel]


@pytest.mark.parametrize(("setting", "others", "limit"), LIMITS, ids=str)
def test_instructions_of_a_step(setting: tuple[int, float], others: dict[str, object], limit: float) -> None:
    """One block of 4096 bf16 elements, when the window is full."""
    window_size, density = setting
    settings = {"rounding": "nearest", **others}
    config = MicroAdamConfig(window_size=window_size, density=density, lr=1e-3, weight_decay=0.01, **settings)
    layout = StateLayout((ShardSpan("w", (1, 4096), 0, 4096),), config)
    generator = torch.Generator().manual_seed(0)
    param, grad = aligned(4096, BF16), aligned(4096, BF16)
    param.normal_(generator=generator)
    state = allocate_state(layout, param.device)
    counting, reference = CountingBackend(), ReferenceBackend()
    for step in range(window_size + 2):
        grad.normal_(generator=generator)
        backend = counting if step == window_size + 1 else reference
        backend.step([TensorStep(param, grad, state, layout, step)], config, 1.0)
    total = sum(counting.per_element.values())
    print(f"{total:.1f}", {phase: round(count, 1) for phase, count in counting.per_element.most_common(12)})
    assert limit - 3 < total <= limit
    assert counting.barriers == (7 if config.packed_window else 6)  # two warps may share a byte of a packed window
