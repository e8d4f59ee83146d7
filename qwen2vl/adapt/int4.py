"""Linear layers of 4-bit weights, on torch's own operator for the CPU.

Up to FEW_ROWS rows (decode) go through `_weight_int4pack_mm_for_cpu`, which widens the weights in
registers, again for every few rows. More rows (prefill) are cheaper by widening the matrix once,
a strip of outputs at a time, for the ordinary product; so nothing larger than a strip ever exists
in full width. A layer has no parameters and cannot be trained.

    torch packs outputs in blocks:   (O / block, I, block / 2) bytes
    one byte of a block:             | output j + block / 2 | output j |     4 bits each

Letters: T rows, O outputs, I inputs, G groups of inputs. Next room: quantise.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.adapt.rounding import Groups

__all__ = ["GROUP_SIZES", "PAD_TO", "Int4Linear"]

GROUP_SIZES = (128, 64, 32)  # that the operator takes; preferred first

# torch's blocks on processors with AVX-512 and with AVX2; outputs are padded to the larger.
BLOCKS = (64, 32)
PAD_TO = max(BLOCKS)

# Where widening a matrix begins to pay: it costs as much as 40 to 50 rows of the operator.
FEW_ROWS = 40

STRIP = 512  # outputs that are widened at once

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

    def integers(self) -> Tensor:
        """Give the weights as they were rounded, (O, I) uint8."""
        block = _block()
        ints_IO = self._ints_by_product() if block is None else _unpack(self.packed, block)
        return ints_IO.T[: self.out_features]

    def dequantised(self) -> Tensor:
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
        if x_TI.shape[0] <= FEW_ROWS or _block() is None:
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
        block = _block()
        assert block is not None
        # Neighbours in memory again: every second number would be read one by one.
        scale_GO, shift_GO = (part.contiguous() for part in self.scales_and_shifts.unbind(-1))
        # q * scale + shift, without the middle that would have to be subtracted first.
        shift_GO = (shift_GO.float() - MIDDLE * scale_GO.float()).to(x_TI.dtype)
        scale_GO = scale_GO.to(x_TI.dtype)
        strips = []
        for start in range(0, len(self.packed), STRIP):
            here = slice(start, start + STRIP)
            ints = _unpack(self.packed[here], block).to(x_TI.dtype)
            weight = ints.unflatten(0, (len(scale_GO), -1))  # (G, inputs of one group, strip)
            torch.addcmul(shift_GO[:, None, here], weight, scale_GO[:, None, here], out=weight)
            strips.append(x_TI @ weight.flatten(0, 1))
        return torch.cat(strips, 1)

    def _ints_by_product(self) -> Tensor:
        """Read integers whose packing is unknown: let the operator multiply by ones and zeros."""
        unit = torch.tensor([1.0, MIDDLE], dtype=torch.bfloat16).expand_as(self.scales_and_shifts)
        one_II = torch.eye(self.in_features, dtype=torch.bfloat16)
        ints_IO = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            one_II, self.packed, self.group_size, unit.contiguous()
        )
        return ints_IO.to(torch.uint8)


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
