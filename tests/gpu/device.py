"""Device and pytest marks of the GPU tests."""

from __future__ import annotations

import pytest
import torch

__all__ = ["GPU", "needs_gpu"]

GPU = torch.device("cuda:0")

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
