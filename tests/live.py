"""How many bytes of tensors are alive: every storage that an operation returns, from then until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made while it is active; `peak` is the most that was alive at once.

    What a kernel takes and gives back inside one operation is not seen.

    Args:
        known: tensors that are there already and are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(t.untyped_storage() for t in known)
        self.trace: list[tuple[str, int]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._watch(t.untyped_storage())
        if self.now > self.peak:
            self.peak, self.where = self.now, str(func)
        if self.trace is not None:
            self.trace.append((str(func), self.now))
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            n = storage.nbytes()
            self.now += n
            weakref.finalize(storage, self._freed, n)

    def _freed(self, n: int) -> None:
        self.now -= n
