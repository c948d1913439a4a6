"""Parts of `launch/study.py`."""

import logging

# transformers imports torchao where it is installed, and that tells at length what it does without.
for _name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_name).setLevel(logging.ERROR)
