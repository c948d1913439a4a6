"""For DeepSpeed users: ``"optimizer": {"type": "MicroAdam", "params": {...}}`` in the DeepSpeed JSON.

``import microadam_dist`` is enough. DeepSpeed looks an unknown optimizer type up in `torch.optim`, and ZeRO accepts
the classes on its list; `register` does the former, and the class adds itself to the list when it is constructed.
"""

from __future__ import annotations

import torch

from .engines.deepspeed import whitelist
from .optimizer import MicroAdam


def register() -> None:
    """Make ``MicroAdam`` known to DeepSpeed's optimizer factory; may be called any number of times.

    Needed by hand only when an optimizer was constructed before DeepSpeed was imported.
    """
    torch.optim.MicroAdam = MicroAdam  # type: ignore[attr-defined]
    whitelist(MicroAdam)


def disable_shm_allreduce() -> None:
    """On a CPU machine: keep DeepSpeed on gloo instead of its shared-memory all-reduce. Call it before initialization.

    That op is compiled at first use (10 to 50 seconds) and leaves a 66 MB file a rank and run in ``/dev/shm``.
    """
    import deepspeed.ops

    for name in deepspeed.ops.__compatible_ops__:
        if "shm" in name:
            deepspeed.ops.__compatible_ops__[name] = False
