"""GPU quantization by torchao: int8 weight-only, int4 weight-only and fp8 dynamic linear layers.

    int8    weight-only, a scale for each output: half the memory. Dequantized in every product,
            which takes longer than reading bfloat16; for memory, not for speed
    int4    weight-only, scale and zero for each group: tinygemm's kernel, bfloat16 only
    fp8     weights and activations in e4m3, a scale for each row: needs compute capability 8.9

torchao is an extra (qwen2vl[gpu-quant]). Its tensors are subclasses without storage of their own;
their components are registered here as plain buffers, which digests and `buffers()` can read. Such
a layer can be neither trained nor saved. scheme.py decides which layers are replaced.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.errors import InputError

__all__ = ["TorchaoLinear", "check_gpu_support", "torchao_linear"]

# The compute capability that torchao's kernels require, by mode.
MIN_COMPUTE_CAPABILITY = {"int8": (7, 5), "int4": (8, 0), "fp8": (8, 9)}


class TorchaoLinear(nn.Module):
    """y = x W^T + b with weights in a torchao tensor subclass."""

    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, description: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight_OI = weight_OI  # not a parameter: a subclass without storage of its own
        names, _ = weight_OI.__tensor_flatten__()  # type: ignore[operator]  of the subclass
        for name in names:
            self.register_buffer(f"weight_{name}", getattr(weight_OI, name))
        self.register_buffer("bias_O", bias_O)
        self._description = description

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O)."""
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return f"{self._description} by torchao"

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"


def check_gpu_support(mode: str, device: torch.device) -> None:
    """Check that a GPU and the installation support a mode.

    Raises:
        InputError: the GPU is too old, or torchao is not installed.
    """
    least, found = MIN_COMPUTE_CAPABILITY[mode], torch.cuda.get_device_capability(device)
    if found < least:
        raise InputError(
            f"quantize {mode!r} needs a GPU of compute capability {_version(least)}, and that of "
            f"{device} is {_version(found)}; leave it out, or use another mode"
        )
    if find_spec("torchao") is None:
        raise InputError(
            f"quantize {mode!r} on {device} needs torchao, which is not installed; pip install "
            "'qwen2vl[gpu-quant]', or leave it out"
        )


def torchao_linear(
    weight_OI: Tensor, bias_O: Tensor | None, mode: str, group_size: int
) -> TorchaoLinear:
    """Quantize a linear layer with torchao; in int4 `group_size` inputs share a scale.

    Raises:
        InputError: int4 or fp8, and the weights are not bfloat16.
    """
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]  # an extra, slow
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    if mode != "int8" and weight_OI.dtype != torch.bfloat16:
        raise InputError(
            f"quantize {mode!r} computes in bfloat16 only, got dtype {str(weight_OI.dtype)[6:]}; "
            "use dtype bfloat16, or quantize 'int8'"
        )
    # By default each would change torch.compile's settings for the whole process.
    if mode == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif mode == "int4":
        config = Int4WeightOnlyConfig(
            group_size=group_size,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    else:
        config = Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), set_inductor_config=False
        )
    with torch.device("meta"):
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    quantize_(layer, config)
    description = f"int4/{group_size}" if mode == "int4" else mode
    return TorchaoLinear(layer.weight.detach(), bias_O, description)


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
