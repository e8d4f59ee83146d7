"""Linear layers of 4-bit weights, on torch's own operator for the CPU.

Up to FEW_ROWS rows (decode) go through `_weight_int4pack_mm_for_cpu`, which widens the weights in
registers, again for every few rows. More rows (prefill) are cheaper by widening the matrix once,
a strip of outputs at a time, for the ordinary product; so nothing larger than a strip ever exists
in full width. `compile_widening` makes one pass of the widening, and it pays for fewer rows. A
layer has no parameters and cannot be trained.

    torch packs outputs in blocks:   (O / block, I, block / 2) bytes
    one byte of a block:             | output j + block / 2 | output j |     4 bits each

Letters: T rows, O outputs, I inputs, G groups of inputs. Next room: quantize.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.aot import Direct, compile_direct
from qwen2vl.quantization.rtn import Groups

__all__ = ["GROUP_SIZES", "PAD_TO", "Int4Linear", "compile_widening", "widen"]

GROUP_SIZES = (128, 64, 32)  # that the operator takes; preferred first

# torch's blocks on processors with AVX-512 and with AVX2; outputs are padded to the larger.
BLOCKS = (64, 32)
PAD_TO = max(BLOCKS)

# Where widening a matrix begins to pay: it costs as much as 40 to 50 rows of the operator, but less
# where it is compiled.
FEW_ROWS = 40
FEW_ROWS_COMPILED = 28

STRIP = 1024  # outputs that are widened at once

MIDDLE = 8  # the operator computes (q - 8) * scale + shift


class Int4Linear(nn.Module):
    """y = x W^T + b with 16 levels to a group of inputs.

    Scales and shifts are bfloat16, as the operator has them; so are its inputs.
    """

    packed: Tensor  # uint8, as torch packs on this processor
    scales_and_shifts: Tensor  # (G, padded O, 2)
    bias_O: Tensor | None

    def __init__(self, rounded: Groups, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = rounded.ints_OI.shape
        self.group_size = rounded.group_size
        missing = -self.out_features % PAD_TO
        self.register_buffer("packed", _pack(F.pad(rounded.ints_OI, (0, 0, 0, missing))))
        scale_GO = rounded.scale_GO.to(torch.bfloat16)
        # Made of the rounded scale, so that a weight of zero stays as near to zero as can be.
        shift_GO = (MIDDLE - rounded.zero_GO.float()) * scale_GO.float()
        both = torch.stack((scale_GO, shift_GO.to(torch.bfloat16)), -1)
        self.register_buffer("scales_and_shifts", F.pad(both, (0, 0, 0, missing)))
        own = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", own)
        self._widen: dict[torch.dtype, Direct] = {}  # compiled; of two blocks and more

    def integers(self) -> Tensor:
        """Give the weights as they were rounded, (O, I) uint8."""
        block = _block()
        ints_IO = self._ints_by_product() if block is None else _unpack(self.packed, block)
        return ints_IO.T[: self.out_features]

    def dequantized(self) -> Tensor:
        """Compute the matrix this layer stands for, in float32: the oracle of its tests."""
        scale_OI, shift_OI = (
            part_GO.T[: self.out_features].float().repeat_interleave(self.group_size, 1)
            for part_GO in self.scales_and_shifts.unbind(-1)
        )
        return (self.integers().float() - MIDDLE) * scale_OI + shift_OI

    def describe(self) -> str:
        """Name the arithmetic, for keys of caches."""
        return f"int4/{self.group_size}"

    def extra_repr(self) -> str:
        """Say the widths, as nn.Linear does."""
        shape = f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"
        return f"{shape}, group_size={self.group_size}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        few_rows = FEW_ROWS_COMPILED if x_TI.dtype in self._widen else FEW_ROWS
        if x_TI.shape[0] <= few_rows or _block() is None:
            out_TO = self._by_operator(x_TI.to(torch.bfloat16)).to(x_TI.dtype)
        else:
            out_TO = self._by_strips(x_TI)
        out_TO = out_TO[:, : self.out_features]
        return out_TO if self.bias_O is None else out_TO + self.bias_O.to(x_TI.dtype)

    def _by_operator(self, x_TI: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x_TI.contiguous(), self.packed, self.group_size, self.scales_and_shifts
        )

    def _by_strips(self, x_TI: Tensor) -> Tensor:
        """Widen some outputs at a time, and multiply by each strip."""
        bytes_, scale, shift = self._blocks(x_TI.dtype)
        num_blocks, half = len(bytes_), bytes_.shape[-1]
        out = x_TI.new_empty(len(x_TI), num_blocks, 2, half)
        for start in range(0, num_blocks, STRIP // (2 * half)):
            here = slice(start, start + STRIP // (2 * half))
            parts = bytes_[here], scale[here], shift[here]
            by = widen if len(parts[0]) == 1 else self._widen.get(x_TI.dtype, widen)
            for part, weight_IO in enumerate(by(*parts)):
                out[:, here, part] = (x_TI @ weight_IO).unflatten(1, (-1, half))
        return out.flatten(1)

    def _blocks(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Give what `widen` takes, for all blocks."""
        block = _block()
        assert block is not None
        groups = len(self.scales_and_shifts)
        bytes_ = self.packed.view(-1, groups, self.group_size, block // 2)
        both = self.scales_and_shifts.view(groups, -1, 2, block // 2, 2).transpose(0, 1)
        # Neighbors in memory again: every second number would be read one by one.
        scale, shift = (part.float().contiguous() for part in both.unbind(-1))
        # q * scale + shift, without the middle that would have to be subtracted first.
        shift -= MIDDLE * scale
        return bytes_, scale.to(dtype), shift.to(dtype)

    def _ints_by_product(self) -> Tensor:
        """Read integers whose packing is unknown: let the operator multiply by ones and zeros."""
        unit = torch.tensor([1.0, MIDDLE], dtype=torch.bfloat16).expand_as(self.scales_and_shifts)
        one_II = torch.eye(self.in_features, dtype=torch.bfloat16)
        ints_IO = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            one_II, self.packed, self.group_size, unit.contiguous()
        )
        return ints_IO.to(torch.uint8)


def compile_widening(model: nn.Module, dtype: torch.dtype) -> None:
    """Let all layers of a model, which computes in `dtype`, widen weights in one compiled pass.

    Raises:
        NotCompiledError: that does not work here; the layers stay as they were.
    """
    if _block() is None:
        return
    made: dict[tuple[int, ...], Direct] = {}
    layers = [layer for layer in model.modules() if isinstance(layer, Int4Linear)]
    kinds = [tuple(layer._blocks(dtype)[0].shape[1:]) for layer in layers]
    for groups, group_size, half in set(kinds):
        bytes_ = torch.zeros(5, groups, group_size, half, dtype=torch.uint8)
        scale, shift = (torch.zeros(5, groups, 2, half, dtype=dtype) for _ in range(2))
        free = dict.fromkeys(range(3), 0)
        made[groups, group_size, half] = compile_direct(widen, (bytes_, scale, shift), free)
    for layer, kind in zip(layers, kinds, strict=True):
        layer._widen[dtype] = made[kind]


def widen(bytes_: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Compute q * scale + shift of both halves of B blocks, in the dtype of the scale.

    Args:
        bytes_: (B, G, inputs of a group, block / 2).
        scale, shift: (B, G, 2, block / 2).

    Returns:
        Weights (I, B * block / 2) of the lower outputs of each block, and of the upper.
    """
    # The order is changed before bytes are taken apart, while they are few.
    bytes_, scale, shift = (
        bytes_.permute(1, 2, 0, 3).contiguous(),
        scale.transpose(0, 1)[:, None],
        shift.transpose(0, 1)[:, None],
    )

    def half(ints: Tensor, part: int) -> Tensor:
        wide = torch.addcmul(shift[..., part, :], ints.to(scale.dtype), scale[..., part, :])
        return wide.flatten(0, 1).flatten(1)

    return half(bytes_ & 15, 0), half(bytes_ >> 4, 1)


def _pack(ints_OI: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints_OI.to(torch.int32), 1)


@lru_cache(maxsize=1)
def _block() -> int | None:
    """Find out how torch packs on this processor; None: in a way that is not drawn above."""
    generator = torch.Generator().manual_seed(0)
    ints_OI = torch.randint(0, 16, (PAD_TO, 32), dtype=torch.uint8, generator=generator)
    for block in BLOCKS:
        if torch.equal(_unpack(_pack(ints_OI), block).T, ints_OI):
            return block
    return None


def _unpack(packed: Tensor, block: int) -> Tensor:
    """Take bytes apart into integers, inputs by outputs (I, O), uint8."""
    num_inputs = 2 * packed.shape[1]
    # The order of bytes is changed before they are taken apart, while they are few.
    bytes_ = packed.view(-1, num_inputs, block // 2).transpose(0, 1).contiguous()
    return torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)
