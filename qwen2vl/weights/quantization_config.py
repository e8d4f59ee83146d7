"""Matrices stored as small integers: what config.json says of them, and what they mean.

The official quantized repositories come in two layouts, GPTQ (gptq.py) and AWQ (awq.py). Both
store each linear layer of the decoder as `qweight`, `qzeros` and `scales` in place of `weight`;
out of either comes a PackedMatrix. Embeddings, norms, head and vision tower stay as they are.
Letters: O outputs and I inputs of a layer, G groups of inputs. (AutoGPTQ: QuantLinear; AutoAWQ:
WQLinear_GEMM.) Next room: gptq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from qwen2vl.errors import CheckpointError

__all__ = ["PACKED_ENDINGS", "REST", "PackedMatrix", "Packing"]

# What stands in place of a layer's `.weight`; AWQ has no g_idx.
PACKED_ENDINGS = (".qweight", ".qzeros", ".scales", ".g_idx")

# Our own addition to quantization_config: how to round what is stored whole, as it is read.
REST = "head_and_vision"

_WHAT_WE_RUN = "this library runs GPTQ of 4 or 8 bits and AWQ of 4 bits (GEMM)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the matrices of a folder are packed."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int  # inputs that share a scale; -1: all of them
    is_symmetric: bool = False  # the zero lies in the middle of the levels
    is_ordered: bool = True  # neighboring inputs share a group (no act-order)
    stores_zero_less_one: bool = False  # GPTQ's first format
    rest: Literal["int8"] | None = None

    @classmethod
    def from_dict(cls, raw: object, where: str) -> Packing:
        """Read `quantization_config`.

        Raises:
            CheckpointError: another method, or a variant that this library does not run.
        """
        settings = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
        method, bits = settings.get("quant_method"), settings.get("bits")
        size = settings.get("group_size")
        _check(settings, where)
        assert isinstance(bits, int)
        assert isinstance(size, int)
        is_gptq = method == "gptq"
        return cls(
            method="gptq" if is_gptq else "awq",
            bits=bits,
            group_size=size,
            is_symmetric=is_gptq and bool(settings.get("sym", True)),
            is_ordered=not (is_gptq and settings.get("desc_act", False)),
            stores_zero_less_one=is_gptq and settings.get("checkpoint_format") != "gptq_v2",
            rest=settings.get(REST),
        )

    def to_dict(self) -> dict[str, Any]:
        """Write `quantization_config` as the official repositories spell it."""
        if self.method == "awq":
            own: dict[str, Any] = {"version": "gemm", "zero_point": True}
            own["modules_to_not_convert"] = ["visual"]
        else:
            own = {"desc_act": not self.is_ordered, "sym": self.is_symmetric}
        rest = {REST: self.rest} if self.rest else {}
        size = {"bits": self.bits, "group_size": self.group_size}
        return {"quant_method": self.method, **size, **own, **rest}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """W[o, i] = (ints_OI[o, i] - zero_GO[g, o]) * scale_GO[g, o], g = group_I[i]."""

    ints_OI: Tensor  # uint8
    scale_GO: Tensor  # as stored, float16
    zero_GO: Tensor  # int16
    group_I: Tensor  # int64

    def dequantized(self) -> Tensor:
        """Compute the matrix these integers stand for, in float32."""
        zero_OI = self.zero_GO[self.group_I].T.float()
        return (self.ints_OI.float() - zero_OI) * self.scale_GO[self.group_I].T.float()


def _check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what is not one of the official layouts, naming what it is."""
    method, bits = settings.get("quant_method"), settings.get("bits")
    allowed = {"gptq": (4, 8), "awq": (4,)}.get(str(method))
    if allowed is None or bits not in allowed or type(bits) is not int:
        name = str(method or "unknown").upper() + (f" {bits}-bit" if bits else "")
        raise CheckpointError(
            f"{where}: the weights are quantized ({name}); {_WHAT_WE_RUN}; take another "
            "repository of this model, such as Qwen/Qwen2-VL-7B-Instruct"
        )
    size = settings.get("group_size")
    if type(size) is not int or not (size == -1 or size > 0):
        raise CheckpointError(
            f"{where}: group_size of quantization_config is {size!r}, expected a whole number "
            "above 0, or -1 for whole rows"
        )
    version = settings.get("version", "gemm")
    if method == "awq" and (str(version).lower() != "gemm" or not settings.get("zero_point", True)):
        raise CheckpointError(
            f"{where}: the weights are packed as AWQ {version} with zero_point "
            f"{settings.get('zero_point', True)}; {_WHAT_WE_RUN}, with zero points"
        )
    if settings.get(REST) not in (None, "int8"):
        raise CheckpointError(
            f"{where}: {REST} of quantization_config is {settings[REST]!r}, must be 'int8'"
        )
