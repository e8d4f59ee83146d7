"""Numbers of a step from the host to the device, without waiting.

A GPU takes small copies one by one, each with a wait for all that was asked of it before, unless
the memory they come from is pinned. So what a step needs is laid end to end, pinned, and copied at
once. Elsewhere tensors stay what they are. Back up: runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["laid_out", "send", "taken_apart"]


def send(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Bring tensors of one dtype to `device`, to a GPU in one copy that nobody waits for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    packed = laid_out(tensors).pin_memory().to(device, non_blocking=True)
    return taken_apart(packed, tensors)


def laid_out(tensors: Sequence[Tensor]) -> Tensor:
    """Lay the numbers of all tensors end to end."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def taken_apart(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Give what was laid end to end the shapes that it had."""
    parts = packed.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
