"""Flattening and unflattening of tensors, and copies on the CPU."""

from __future__ import annotations

import torch

from qwen2vl.engine.kv_cache.storage import copy_to_device, flatten_tensors, unflatten_tensors

DEVICE = torch.device("cpu")


def test_unflatten_restores_shapes_and_values() -> None:
    tensors = [
        torch.arange(4),
        torch.arange(6).view(2, 3) + 10,
        torch.empty(0, dtype=torch.int64),
        torch.arange(3).expand(3, -1),
    ]
    flat = flatten_tensors(tensors)
    assert flat.shape == (4 + 6 + 0 + 9,)
    for got, want in zip(unflatten_tensors(flat, tensors), tensors, strict=True):
        assert torch.equal(got, want)


def test_on_the_cpu_tensors_are_not_copied() -> None:
    tensor = torch.arange(3)
    assert copy_to_device(DEVICE, tensor)[0] is tensor
