"""Digest of the vision tower's weights, 32 bytes: the part of the encoder cache key beside pixels.

Cached vision embeddings are valid only for the weights that computed them. A retrained model has
the same names and shapes and may differ in a single number, so every byte is hashed, not a sample.
The hash is SHA-256, which processors compute in hardware (about twice the speed of BLAKE2b here),
per tensor on several threads, once for each state of the weights. It is needed only if embeddings
outlive the process (disk cache); within one process each state gets a random digest instead.
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

__all__ = ["VisionWeightsDigest", "hash_vision_tower"]

MAX_THREADS = 4  # beyond that, memory and the copies from a GPU are the limit


class VisionWeightsDigest:
    """Digest of the current weights of a model's vision tower, recomputed when they change.

    Changes are detected by torch's version counter of in-place writes (`copy_`, `load_state_dict`),
    by replaced tensors, and by any optimizer step in this process, since fused optimizers write
    without counting. Writes into the same memory through `.data` or numpy are not detected.
    """

    def __init__(self, model: Qwen2VL, *, persistent: bool, description: str = "") -> None:
        """Track the vision tower of `model`; nothing is hashed yet.

        Args:
            model: the model that encodes.
            persistent: the digest must be valid in other processes, so hash the weights.
            description: anything else that changes the embeddings and is neither a class, a
                parameter nor a buffer of the tower, such as the packing of quantized weights.
        """
        self._tower = model.visual
        self._persistent = persistent
        self._description = description
        self._steps = _optimizer_steps()
        self._state: tuple[int, list[_TensorVersion]] = (0, [])
        self._digest: Future[bytes] | None = None

    def digest(self) -> bytes:
        """Return 32 bytes that differ whenever the embeddings of an image could differ.

        Costs an iteration over the tower's tensors (a millisecond for the official ones), and a
        hash of all weights if they changed.
        """
        return self.start_hashing().result()

    def start_hashing(self) -> Future[bytes]:
        """Start computing the digest in the background, if the weights changed."""
        tensors = _tensors(self._tower).values()
        steps, versions = self._state
        if (
            self._digest is None
            or steps != self._steps.count
            or not _is_unchanged(versions, tensors)
        ):
            self._state = (
                self._steps.count,
                [_TensorVersion.from_tensor(tensor) for tensor in tensors],
            )
            self._digest = self._new_digest()
        return self._digest

    def _new_digest(self) -> Future[bytes]:
        if not self._persistent:
            digest: Future[bytes] = Future()
            digest.set_result(os.urandom(32))
            return digest
        executor = ThreadPoolExecutor(1, thread_name_prefix="weights-digest")
        digest = executor.submit(hash_vision_tower, self._tower, self._description)
        executor.shutdown(wait=False)
        return digest


def hash_vision_tower(tower: VisionTower, description: str = "") -> bytes:
    """Hash all that embeddings depend on: release, config, module classes, tensor content."""
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
    """Counter of the steps of all optimizers in this process since its creation."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._count_step)

    def _count_step(self, *_: object) -> None:
        self.count += 1


_optimizer_steps = cache(_OptimizerSteps)  # one hook for all tracked models


@dataclass(frozen=True, slots=True)
class _TensorVersion:
    """Identity and version of a tensor at the time its content was hashed."""

    tensor: weakref.ref[Tensor]  # the address alone may be reused by another tensor
    version: int
    address: int

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> _TensorVersion:
        return cls(weakref.ref(tensor), _version(tensor), _address(tensor))

    def matches(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.version == _version(tensor)
            and self.address == _address(tensor)
        )


def _is_unchanged(versions: Sequence[_TensorVersion], tensors: Collection[Tensor]) -> bool:
    return len(versions) == len(tensors) and all(
        version.matches(tensor) for version, tensor in zip(versions, tensors, strict=True)
    )


def _tensors(tower: VisionTower) -> dict[str, Tensor]:
    return {**dict(tower.named_parameters()), **dict(tower.named_buffers())}


def _version(tensor: Tensor) -> int:
    # Tensors created in inference mode have no counter, and reject in-place writes outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    # Prepacked (mkldnn) weights have no address; they are never written in place.
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _hash_tensor(tensor: Tensor) -> bytes:
    dense = tensor.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    flat = dense.cpu().contiguous().view(-1).view(torch.uint8)
    return sha256(flat.numpy().data).digest()
