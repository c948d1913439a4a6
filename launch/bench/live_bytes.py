"""Bytes of the tensors that are made inside a context: their sum now, and its peak."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages that did not exist before, also those that FSDP frees and fills again by resizing.

    Attributes:
        now: Bytes that are alive.
        peak: Most of them so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()
        for tensor in filter(_is_plain, gc.get_objects()):
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._known.discard, storage._cdata)  # another may get its address
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return self._resize(storage, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in filter(_is_plain, tree_leaves(outputs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes and storage._cdata not in self._known:
                self._set(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._set, storage._cdata, 0)
        return outputs

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.pop(key, 0)
        self.peak = max(self.peak, self.now)
        if size:
            self._sizes[key] = size


def _is_plain(thing: Any) -> bool:
    return type(thing) in (Tensor, torch.nn.Parameter) and thing.layout == torch.strided
