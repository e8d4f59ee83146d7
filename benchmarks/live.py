"""How many bytes of tensors live at once: a measure that sees every tensor torch makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "live_bytes"]


class LiveBytes(TorchDispatchMode):
    """Follow the storages of chosen tensors from their making to their end."""

    def __init__(self, last_axis: int | None, at_least: int) -> None:
        super().__init__()
        self.peak = 0
        self._last_axis = last_axis
        self._at_least = at_least
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        # What shares the memory of an argument is a view of it: counted before, or none of ours.
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        given = {value.untyped_storage()._cdata for value in tensors}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and self._counts(value, given):
                storage = value.untyped_storage()
                reference = StorageWeakRef(storage)
                self._known[reference.cdata] = (reference, storage.nbytes())
        self._known = {key: pair for key, pair in self._known.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return result

    def _counts(self, tensor: Tensor, given: set[int]) -> bool:
        if tensor.untyped_storage()._cdata in given:
            return False
        if self._last_axis is not None and tensor.shape[-1:] != (self._last_axis,):
            return False
        return tensor.untyped_storage().nbytes() >= self._at_least


@contextmanager
def live_bytes(*, last_axis: int | None = None, at_least: int = 0) -> Iterator[LiveBytes]:
    """Count tensors made inside whose last axis has that length, or that are so large."""
    mode = LiveBytes(last_axis, at_least)
    with mode:
        yield mode
