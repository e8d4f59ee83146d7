"""What vision rows depend on besides pixels: the tower as it stands, as 32 bytes.

Rows kept by a cache may be served again only to the weights that made them. A retrained model has
the same names and shapes and may differ in a single number, so sampling the weights would not do:
every byte is hashed. That is SHA-256, which processors compute in hardware (about twice BLAKE2b's
speed here), tensor by tensor on several threads, once for each state of the weights, and only
where rows outlive the process; within one process a random name for each state is as good. It
must not know requests. Next room: vision_cache.py.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import qwen2vl
from qwen2vl.model import Qwen2VL
from qwen2vl.model.vision import VisionTower

__all__ = ["VisionWeights", "hash_tower"]

MAX_THREADS = 4  # beyond that, memory and the copies from a GPU are the limit


class VisionWeights:
    """Names the present state of a model's vision tower.

    A change is noticed by torch's own counter of in-place writes (`copy_`, `load_state_dict`), by
    replaced tensors, and by any step of an optimizer in this process, since fused ones write
    without counting. Writes into the same memory through `.data` or numpy are not seen.
    """

    def __init__(self, model: Qwen2VL, *, lasting: bool, description: str = "") -> None:
        """Watch the tower of `model`; nothing is hashed yet.

        Args:
            model: the model that encodes.
            lasting: the name must hold in other processes, too: hash the weights.
            description: whatever changes the rows and is neither a class, a parameter nor a
                buffer of the tower, such as how a quantized layer packs its weights.
        """
        self._tower = model.visual
        self._lasting = lasting
        self._description = description
        self._steps = _optimizer_steps()
        self._state: tuple[int, list[_Stamp]] = (0, [])
        self._name: Future[bytes] | None = None

    def fingerprint(self) -> bytes:
        """Return 32 bytes that differ whenever the rows of a picture could differ.

        Costs a walk over the tower's tensors (a millisecond for the official ones), and the hash
        of all weights when they are new.
        """
        return self.start().result()

    def start(self) -> Future[bytes]:
        """Begin in the background what `fingerprint` would wait for, if the weights are new."""
        tensors = _tensors(self._tower).values()
        steps, stamps = self._state
        if self._name is None or steps != self._steps.count or not _is_same(stamps, tensors):
            self._state = (self._steps.count, [_Stamp.of(tensor) for tensor in tensors])
            self._name = self._begin()
        return self._name

    def _begin(self) -> Future[bytes]:
        if not self._lasting:
            name: Future[bytes] = Future()
            name.set_result(os.urandom(32))
            return name
        with_one_thread = ThreadPoolExecutor(1, thread_name_prefix="fingerprint")
        name = with_one_thread.submit(hash_tower, self._tower, self._description)
        with_one_thread.shutdown(wait=False)
        return name


def hash_tower(tower: VisionTower, description: str = "") -> bytes:
    """Hash everything that rows follow from: this release, config, modules, tensors' content."""
    hasher = sha256(f"{qwen2vl.__version__}\n{tower.config}\n{description}\n".encode())
    for name, module in tower.named_modules():
        hasher.update(f"{name} {type(module).__qualname__}\n".encode())
    tensors = _tensors(tower)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        digests = threads.map(_hash_tensor, tensors.values())
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True):
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + digest)
    return hasher.digest()


class _OptimizerSteps:
    """Counts the steps of all optimizers in this process, from now on."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._one_more)

    def _one_more(self, *_: object) -> None:
        self.count += 1


_optimizer_steps = cache(_OptimizerSteps)  # one hook, however many models are watched


@dataclass(frozen=True, slots=True)
class _Stamp:
    """One tensor as it was when its content was hashed."""

    tensor: weakref.ref[Tensor]  # identity: an address alone may be given away again
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp:
        return cls(weakref.ref(tensor), _version(tensor), _address(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == _version(tensor)
            and self.address == _address(tensor)
        )


def _is_same(state: Sequence[_Stamp], tensors: Collection[Tensor]) -> bool:
    return len(state) == len(tensors) and all(
        stamp.is_still(tensor) for stamp, tensor in zip(state, tensors, strict=True)
    )


def _tensors(tower: VisionTower) -> dict[str, Tensor]:
    return {**dict(tower.named_parameters()), **dict(tower.named_buffers())}


def _version(tensor: Tensor) -> int:
    # Tensors born in inference mode have no counter, and refuse in-place writes outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    # Packed (mkldnn) weights have no address; they are never written in place.
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _hash_tensor(tensor: Tensor) -> bytes:
    dense = tensor.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    flat = dense.cpu().contiguous().view(-1).view(torch.uint8)
    return sha256(flat.numpy().data).digest()
