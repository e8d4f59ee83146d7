"""Host-to-device copies of a step's index tensors, batched and non-blocking.

Copies from unpinned memory synchronize with the GPU, each one separately. So the tensors of a step
are flattened into one, pinned, copied in one non-blocking transfer, and split again on the GPU. On
other devices each tensor is moved as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["copy_to_device", "flatten_tensors", "unflatten_tensors"]


def copy_to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy tensors of one dtype to `device`; to a GPU in one non-blocking transfer."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = flatten_tensors(tensors).pin_memory().to(device, non_blocking=True)
    return unflatten_tensors(flat, tensors)


def flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten all tensors and concatenate them."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unflatten_tensors(flat: Tensor, templates: Sequence[Tensor]) -> list[Tensor]:
    """Split what `flatten_tensors` returned into tensors of the shapes of `templates`."""
    parts = flat.split([tensor.numel() for tensor in templates])
    return [part.view(tensor.shape) for part, tensor in zip(parts, templates, strict=True)]
