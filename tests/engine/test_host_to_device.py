"""What is laid end to end comes back as it was."""

from __future__ import annotations

import torch

from qwen2vl.engine.host_to_device import laid_out, send, taken_apart

DEVICE = torch.device("cpu")


def test_shapes_and_numbers_come_back() -> None:
    tensors = [
        torch.arange(4),
        torch.arange(6).view(2, 3) + 10,
        torch.empty(0, dtype=torch.int64),
        torch.arange(3).expand(3, -1),
    ]
    packed = laid_out(tensors)
    assert packed.shape == (4 + 6 + 0 + 9,)
    for got, want in zip(taken_apart(packed, tensors), tensors, strict=True):
        assert torch.equal(got, want)


def test_on_the_cpu_tensors_stay_what_they_are() -> None:
    tensor = torch.arange(3)
    assert send(DEVICE, tensor)[0] is tensor
