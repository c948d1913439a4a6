"""Set up for all tests."""

import torch

# The tensors are tiny: one thread is faster than two, and ranks run beside each other.
torch.set_num_threads(1)
