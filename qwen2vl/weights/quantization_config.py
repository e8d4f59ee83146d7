"""quantization_config of config.json (GPTQ, AWQ), and the unpacked form of a quantized matrix.

The official quantized repositories come in two packing formats, GPTQ (gptq_format.py) and AWQ
(awq_format.py). Both store each linear layer of the decoder as `qweight`, `qzeros` and `scales` in
place of `weight`; both unpack into a QuantizedMatrix. Embeddings, norms, head and vision tower are
not quantized. Letters: O outputs and I inputs of a layer, G groups of inputs. (AutoGPTQ:
QuantLinear; AutoAWQ: WQLinear_GEMM; transformers: GPTQConfig, AwqConfig.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from qwen2vl.errors import CheckpointError

__all__ = ["HEAD_AND_VISION_KEY", "PACKED_SUFFIXES", "QuantizationConfig", "QuantizedMatrix"]

# The tensors in place of a layer's `.weight`; AWQ has no g_idx.
PACKED_SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")

# An additional key of quantization_config: how to quantize the unquantized layers while loading.
HEAD_AND_VISION_KEY = "head_and_vision"

_SUPPORTED = "this library runs GPTQ of 4 or 8 bits and AWQ of 4 bits (GEMM)"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How the decoder's matrices of a folder are quantized and packed."""

    method: Literal["gptq", "awq"]
    bits: int
    group_size: int  # inputs that share a scale; -1: all of them
    is_symmetric: bool = False  # the zero point is the middle of the range
    has_contiguous_groups: bool = True  # inputs of a group are neighbors (no act-order)
    stores_zero_minus_one: bool = False  # GPTQ v1 (checkpoint_format "gptq")
    head_and_vision: Literal["int8"] | None = None  # of the layers to quantize while loading

    @classmethod
    def from_dict(cls, raw: object, where: str) -> QuantizationConfig:
        """Parse `quantization_config`.

        Raises:
            CheckpointError: another method, or a variant that is not supported.
        """
        settings = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
        method, bits = settings.get("quant_method"), settings.get("bits")
        size = settings.get("group_size")
        _check_supported(settings, where)
        assert isinstance(bits, int)
        assert isinstance(size, int)
        is_gptq = method == "gptq"
        return cls(
            method="gptq" if is_gptq else "awq",
            bits=bits,
            group_size=size,
            is_symmetric=is_gptq and bool(settings.get("sym", True)),
            has_contiguous_groups=not (is_gptq and settings.get("desc_act", False)),
            stores_zero_minus_one=is_gptq and settings.get("checkpoint_format") != "gptq_v2",
            head_and_vision=settings.get(HEAD_AND_VISION_KEY),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return `quantization_config` as the official repositories spell it."""
        if self.method == "awq":
            options: dict[str, Any] = {"version": "gemm", "zero_point": True}
            options["modules_to_not_convert"] = ["visual"]
        else:
            options = {"desc_act": not self.has_contiguous_groups, "sym": self.is_symmetric}
        extra = {HEAD_AND_VISION_KEY: self.head_and_vision} if self.head_and_vision else {}
        size = {"bits": self.bits, "group_size": self.group_size}
        return {"quant_method": self.method, **size, **options, **extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """Unpacked: W[o, i] = (ints_OI[o, i] - zero_GO[g, o]) * scale_GO[g, o], g = group_I[i]."""

    ints_OI: Tensor  # uint8
    scale_GO: Tensor  # as stored, float16
    zero_GO: Tensor  # int16
    group_I: Tensor  # int64

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix (O, I), in float32."""
        zero_OI = self.zero_GO[self.group_I].T.float()
        return (self.ints_OI.float() - zero_OI) * self.scale_GO[self.group_I].T.float()


def _check_supported(settings: Mapping[str, Any], where: str) -> None:
    """Refuse everything but the official formats; the error names what was found."""
    method, bits = settings.get("quant_method"), settings.get("bits")
    allowed = {"gptq": (4, 8), "awq": (4,)}.get(str(method))
    if allowed is None or bits not in allowed or type(bits) is not int:
        name = str(method or "unknown").upper() + (f" {bits}-bit" if bits else "")
        raise CheckpointError(
            f"{where}: the weights are quantized ({name}); {_SUPPORTED}; take another "
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
            f"{settings.get('zero_point', True)}; {_SUPPORTED}, with zero points"
        )
    if settings.get(HEAD_AND_VISION_KEY) not in (None, "int8"):
        raise CheckpointError(
            f"{where}: {HEAD_AND_VISION_KEY} of quantization_config is "
            f"{settings[HEAD_AND_VISION_KEY]!r}, must be 'int8'"
        )
