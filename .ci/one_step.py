"""Whether an installed wheel has its CPU kernel: one step with it."""

import torch

from microadam_dist import MicroAdam

param = torch.nn.Parameter(torch.ones(64, 64))
param.grad = torch.randn(64, 64)
MicroAdam([param], backend="cpu").step()
num_changed = int((param != 1).sum())
assert num_changed == 64 * 7, num_changed  # ceil(0.1 * 64) in each of 64 rows
print("one step of the CPU kernel: right")
