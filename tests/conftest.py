"""Set up for all tests."""

import sys
from pathlib import Path

import torch

# As Python does for a script there, in the processes that ranks are, too.
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

# The tensors are tiny: one thread is faster than two, and ranks run beside each other.
torch.set_num_threads(1)
