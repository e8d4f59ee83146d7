"""Linear layers of small numbers on a GPU, held and multiplied by torchao.

    int8    weights alone, a scale for each output: half the memory. They are widened in every
            product, which takes longer than bfloat16 reads; for memory, not for speed
    int4    weights alone, scale and zero for each group: tinygemm's kernel, bfloat16 only
    fp8     weights and rows, e4m3, a scale for each: tensor cores of compute capability 8.9

torchao is an extra (qwen2vl[gpu-quant]). Its tensors are subclasses without memory of their own;
what they consist of is registered here as plain buffers, which fingerprints and walks over a model
can read. Such a layer can be neither trained nor saved. Back up: quantize.py, for which layers.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.errors import InputError

__all__ = ["NarrowLinear", "check_gpu", "narrow_linear"]

# Least compute capability, by mode: of torchao's kernels.
LEAST = {"int8": (7, 5), "int4": (8, 0), "fp8": (8, 9)}


class NarrowLinear(nn.Module):
    """y = x W^T + b with weights that torchao holds."""

    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, how: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        self.weight_OI = weight_OI  # no parameter: it has no address and no bytes of its own
        names, _ = weight_OI.__tensor_flatten__()  # type: ignore[operator]  a tensor subclass's
        for name in names:
            self.register_buffer(f"weight_{name}", getattr(weight_OI, name))
        self.register_buffer("bias_O", bias_O)
        self._how = how

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O)."""
        return F.linear(x_TI, self.weight_OI, self.bias_O)

    def describe(self) -> str:
        """Name the arithmetic, for keys of caches."""
        return f"{self._how} by torchao"

    def extra_repr(self) -> str:
        """Say the widths, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"


def check_gpu(mode: str, device: torch.device) -> None:
    """Make sure that layers of a mode can be computed on a GPU.

    Raises:
        InputError: the GPU or the installation has not what it takes.
    """
    least, found = LEAST[mode], torch.cuda.get_device_capability(device)
    if found < least:
        raise InputError(
            f"quantize {mode!r} needs a GPU of compute capability {_dotted(least)}, and that of "
            f"{device} is {_dotted(found)}; leave it out, or use another mode"
        )
    if find_spec("torchao") is None:
        raise InputError(
            f"quantize {mode!r} on {device} needs torchao, which is not installed; pip install "
            "'qwen2vl[gpu-quant]', or leave it out"
        )


def narrow_linear(
    weight_OI: Tensor, bias_O: Tensor | None, mode: str, group_size: int
) -> NarrowLinear:
    """Round the weights of a linear layer; `group_size` inputs share a scale in int4.

    Raises:
        InputError: the weights are not bfloat16, which int4 and fp8 must be.
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
    # Each would otherwise change settings of torch.compile for the whole process.
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
    how = f"int4/{group_size}" if mode == "int4" else mode
    return NarrowLinear(layer.weight.detach(), bias_O, how)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
