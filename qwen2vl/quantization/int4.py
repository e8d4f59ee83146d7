"""Int4 linear layers (weight-only, group-wise, W4A16), on torch's own operator for the CPU.

Up to MAX_FUSED_ROWS rows (decode) are computed by `_weight_int4pack_mm_for_cpu`, which dequantizes
the weights in registers, again for every few rows. For more rows (prefill) it is cheaper to
dequantize the matrix once, one tile of outputs at a time, and to multiply by GEMM; no more than a
tile is ever in memory dequantized. `compile_dequantization` fuses the dequantization into one pass,
which then pays from fewer rows on. A layer has no parameters and cannot be trained.

    torch packs outputs in blocks:   (O / block, I, block / 2) bytes
    one byte of a block:             | output j + block / 2 | output j |     4 bits each

Letters: T rows, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.aot import CompiledFunction, compile_ahead_of_time
from qwen2vl.quantization.rtn import GroupwiseWeight

__all__ = ["GROUP_SIZES", "PAD_TO", "Int4Linear", "compile_dequantization", "dequantize_blocks"]

GROUP_SIZES = (128, 64, 32)  # supported by the operator; preferred first

# Outputs of a packing block on processors with AVX-512 and with AVX2; outputs are padded to the
# larger.
PACKING_BLOCK_SIZES = (64, 32)
PAD_TO = max(PACKING_BLOCK_SIZES)

# Beyond these rows the matrix is dequantized: that costs as much as 40 to 50 rows of the operator,
# and less where it is compiled.
MAX_FUSED_ROWS = 40
MAX_FUSED_ROWS_COMPILED = 28

TILE_OUTPUTS = 1024  # outputs that are dequantized at once

ZERO_POINT = 8  # the operator computes (q - 8) * scale + shift


class Int4Linear(nn.Module):
    """y = x W^T + b with 4-bit weights, asymmetric, one scale and shift for each group of inputs.

    Scales and shifts (torch: qScaleAndZeros) are bfloat16, which the operator requires, also of x.
    """

    packed: Tensor  # uint8, in torch's layout for this processor
    scales_and_shifts: Tensor  # (G, padded O, 2)
    bias_O: Tensor | None

    def __init__(self, weight: GroupwiseWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.ints_OI.shape
        self.group_size = weight.group_size
        padding = -self.out_features % PAD_TO
        self.register_buffer("packed", _pack_tiles(F.pad(weight.ints_OI, (0, 0, 0, padding))))
        scale_GO = weight.scale_GO.to(torch.bfloat16)
        # From the bfloat16 scale, so that a weight of 0 stays as near to 0 as bfloat16 allows.
        shift_GO = (ZERO_POINT - weight.zero_GO.float()) * scale_GO.float()
        both = torch.stack((scale_GO, shift_GO.to(torch.bfloat16)), -1)
        self.register_buffer("scales_and_shifts", F.pad(both, (0, 0, 0, padding)))
        float_bias_O = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", float_bias_O)
        # `dequantize_blocks`, compiled for two blocks and more.
        self._compiled_dequantize: dict[torch.dtype, CompiledFunction] = {}

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) uint8."""
        block = _packing_block_size()
        ints_IO = self._unpack_by_matmul() if block is None else _unpack(self.packed, block)
        return ints_IO.T[: self.out_features]

    def dequantize(self) -> Tensor:
        """Compute the dequantized weights (O, I) in float32: the reference of the tests."""
        scale_OI, shift_OI = (
            part_GO.T[: self.out_features].float().repeat_interleave(self.group_size, 1)
            for part_GO in self.scales_and_shifts.unbind(-1)
        )
        return (self.quantized_weight().float() - ZERO_POINT) * scale_OI + shift_OI

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return f"int4/{self.group_size}"

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        shape = f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"
        return f"{shape}, group_size={self.group_size}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        max_rows = (
            MAX_FUSED_ROWS_COMPILED if x_TI.dtype in self._compiled_dequantize else MAX_FUSED_ROWS
        )
        if x_TI.shape[0] <= max_rows or _packing_block_size() is None:
            out_TO = self._int4_matmul(x_TI.to(torch.bfloat16)).to(x_TI.dtype)
        else:
            out_TO = self._dequantize_and_multiply(x_TI)
        out_TO = out_TO[:, : self.out_features]
        return out_TO if self.bias_O is None else out_TO + self.bias_O.to(x_TI.dtype)

    def _int4_matmul(self, x_TI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x_TI.contiguous(), self.packed, self.group_size, self.scales_and_shifts
        )

    def _dequantize_and_multiply(self, x_TI: Tensor) -> Tensor:
        """Dequantize one tile of outputs at a time, and multiply by it."""
        bytes_, scale, shift = self._dequantization_inputs(x_TI.dtype)
        num_blocks, half = len(bytes_), bytes_.shape[-1]
        out = x_TI.new_empty(len(x_TI), num_blocks, 2, half)
        for start in range(0, num_blocks, TILE_OUTPUTS // (2 * half)):
            tile = slice(start, start + TILE_OUTPUTS // (2 * half))
            parts = bytes_[tile], scale[tile], shift[tile]
            dequantize = (
                dequantize_blocks
                if len(parts[0]) == 1
                else self._compiled_dequantize.get(x_TI.dtype, dequantize_blocks)
            )
            for part, weight_IO in enumerate(dequantize(*parts)):
                out[:, tile, part] = (x_TI @ weight_IO).unflatten(1, (-1, half))
        return out.flatten(1)

    def _dequantization_inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `dequantize_blocks` for all blocks."""
        block = _packing_block_size()
        assert block is not None
        groups = len(self.scales_and_shifts)
        bytes_ = self.packed.view(-1, groups, self.group_size, block // 2)
        both = self.scales_and_shifts.view(groups, -1, 2, block // 2, 2).transpose(0, 1)
        # Contiguous, so that scales are read in vectors and not element by element.
        scale, shift = (part.float().contiguous() for part in both.unbind(-1))
        # q * scale + shift, with the subtraction of ZERO_POINT moved into the shift.
        shift -= ZERO_POINT * scale
        return bytes_, scale.to(dtype), shift.to(dtype)

    def _unpack_by_matmul(self) -> Tensor:
        """Read integers from an unknown packing: multiply by the identity with the operator."""
        unit = torch.tensor([1.0, ZERO_POINT], dtype=torch.bfloat16).expand_as(
            self.scales_and_shifts
        )
        one_II = torch.eye(self.in_features, dtype=torch.bfloat16)
        ints_IO = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            one_II, self.packed, self.group_size, unit.contiguous()
        )
        return ints_IO.to(torch.uint8)


def compile_dequantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Compile the dequantization of all Int4Linear layers of a model that computes in `dtype`.

    Raises:
        CompilationError: nothing can be compiled on this machine; the layers are not changed.
    """
    if _packing_block_size() is None:
        return
    compiled: dict[tuple[int, ...], CompiledFunction] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    shapes = [tuple(layer._dequantization_inputs(dtype)[0].shape[1:]) for layer in layers]
    for groups, group_size, half in set(shapes):
        bytes_ = torch.zeros(5, groups, group_size, half, dtype=torch.uint8)
        scale, shift = (torch.zeros(5, groups, 2, half, dtype=dtype) for _ in range(2))
        dynamic_dims = dict.fromkeys(range(3), 0)
        compiled[groups, group_size, half] = compile_ahead_of_time(
            dequantize_blocks, (bytes_, scale, shift), dynamic_dims
        )
    for layer, shape in zip(layers, shapes, strict=True):
        layer._compiled_dequantize[dtype] = compiled[shape]


def dequantize_blocks(bytes_: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantize both halves of B packing blocks: q * scale + shift, in the dtype of the scale.

    Args:
        bytes_: (B, G, inputs of a group, block / 2).
        scale, shift: (B, G, 2, block / 2).

    Returns:
        Weights (I, B * block / 2) of the lower outputs of each block, and of the upper.
    """
    # Transposed before bytes are unpacked, while they are half as many.
    bytes_, scale, shift = (
        bytes_.permute(1, 2, 0, 3).contiguous(),
        scale.transpose(0, 1)[:, None],
        shift.transpose(0, 1)[:, None],
    )

    def half(ints: Tensor, part: int) -> Tensor:
        weight = torch.addcmul(shift[..., part, :], ints.to(scale.dtype), scale[..., part, :])
        return weight.flatten(0, 1).flatten(1)

    return half(bytes_ & 15, 0), half(bytes_ >> 4, 1)


def _pack_tiles(ints_OI: Tensor) -> Tensor:
    """Pack a tile of outputs at a time: torch takes int32, four times the bytes of the integers."""
    if _packing_block_size() is None:  # tiles of an unknown layout may not be separate
        return _pack(ints_OI)
    return torch.cat([_pack(tile_OI) for tile_OI in ints_OI.split(TILE_OUTPUTS)])


def _pack(ints_OI: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints_OI.to(torch.int32), 1)


@lru_cache(maxsize=1)
def _packing_block_size() -> int | None:
    """Detect torch's packing block size on this processor; None if the layout is unknown."""
    generator = torch.Generator().manual_seed(0)
    ints_OI = torch.randint(0, 16, (PAD_TO, 32), dtype=torch.uint8, generator=generator)
    for block in PACKING_BLOCK_SIZES:
        if torch.equal(_unpack(_pack(ints_OI), block).T, ints_OI):
            return block
    return None


def _unpack(packed: Tensor, block: int) -> Tensor:
    """Unpack bytes into integers, inputs by outputs (I, O), uint8."""
    num_inputs = 2 * packed.shape[1]
    # Transposed before bytes are unpacked, while they are half as many.
    bytes_ = packed.view(-1, num_inputs, block // 2).transpose(0, 1).contiguous()
    return torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)
