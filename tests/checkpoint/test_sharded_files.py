"""`save_sharded` and `load_sharded` in one process; `tests/distributed` has the engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from microadam_dist import MicroAdam, load_sharded, save_sharded


def test_state_of_parameters_that_the_optimizer_lacks_is_named(tmp_path: Path) -> None:
    """A layer that was trained and is frozen now, in an optimizer of what is trained."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = MicroAdam(model.named_parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    save_sharded(optimizer, tmp_path)
    rest = MicroAdam((name, param) for name, param in model.named_parameters() if name.startswith("1."))
    with pytest.warns(
        UserWarning, match=r"2 parameters that this optimizer does not have, such as 0\.bias, 0\.weight:"
    ):
        load_sharded(rest, tmp_path)
    for param in model[1].parameters():
        assert all(torch.equal(tensor, optimizer.state[param][name]) for name, tensor in rest.state[param].items())
