"""Tensor memory: the peak of bytes in tensors that are alive at once, by a TorchDispatchMode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TensorMemoryMode", "track_tensor_memory"]


class TensorMemoryMode(TorchDispatchMode):
    """Tracks the storages of selected tensors from allocation to deallocation."""

    def __init__(self, last_axis: int | None, min_bytes: int) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._last_axis = last_axis
        self._min_bytes = min_bytes
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        # A result that shares memory with an argument is a view: counted before, or not selected.
        inputs = [tensor for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._is_counted(tensor, input_storages):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = (reference, storage.nbytes())
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result

    def _is_counted(self, tensor: Tensor, input_storages: set[int]) -> bool:
        if tensor.untyped_storage()._cdata in input_storages:
            return False
        if self._last_axis is not None and tensor.shape[-1:] != (self._last_axis,):
            return False
        return tensor.untyped_storage().nbytes() >= self._min_bytes


@contextmanager
def track_tensor_memory(
    *, last_axis: int | None = None, min_bytes: int = 0
) -> Iterator[TensorMemoryMode]:
    """Track tensors created inside with this size of the last axis, or of at least `min_bytes`."""
    mode = TensorMemoryMode(last_axis, min_bytes)
    with mode:
        yield mode
