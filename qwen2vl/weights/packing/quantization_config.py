"""quantization_config of config.json: GPTQ, AWQ and compressed-tensors.

The official quantized repositories store each linear layer of the decoder as GPTQ or AWQ, and
embeddings, norms, head and vision tower as they were. compressed-tensors has one or more groups of
layers with a format each (config_groups.py); this library writes it. (transformers: GPTQConfig,
AwqConfig, CompressedTensorsConfig.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.packing.config_groups import (
    MIXED_PRECISION,
    ConfigGroup,
    parse_config_groups,
)
from qwen2vl.weights.packing.packed_format import PackedFormat

__all__ = ["HEAD_AND_VISION_KEY", "PACKED_SUFFIXES", "QuantizationConfig"]

# The tensors of packed layers; AWQ has no g_idx. An int8 `.weight` is recognized by its scale.
PACKED_SUFFIXES = (
    *(".qweight", ".qzeros", ".scales", ".g_idx"),
    *(".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape"),
)

# An additional key of quantization_config: layers that are stored unquantized, such as the head,
# are quantized to this while loading.
HEAD_AND_VISION_KEY = "head_and_vision"

COMPRESSED_TENSORS = "compressed-tensors"

_SUPPORTED = (
    "this library runs GPTQ of 4 or 8 bits, AWQ of 4 bits (GEMM), and W8A8 and W4A16 of "
    "compressed-tensors"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationConfig:
    """How the quantized layers of a folder are packed."""

    method: Literal["gptq", "awq", "compressed-tensors"]
    groups: tuple[ConfigGroup, ...]  # of GPTQ and AWQ one, for all packed layers
    ignore: tuple[str, ...] = ()  # targets that are not quantized; the tensors tell, too
    head_and_vision: Literal["int8"] | None = None

    @property
    def formats(self) -> tuple[PackedFormat, ...]:
        """The format of each group."""
        return tuple(group.format for group in self.groups)

    @classmethod
    def from_dict(cls, raw: object, where: str) -> QuantizationConfig:
        """Parse `quantization_config`.

        Raises:
            CheckpointError: another method, or a variant that is not supported.
        """
        settings = cast("Mapping[str, Any]", raw) if isinstance(raw, Mapping) else {}
        method = settings.get("quant_method")
        head_and_vision = settings.get(HEAD_AND_VISION_KEY)
        ignore: tuple[str, ...] = ()
        if method == COMPRESSED_TENSORS:
            groups = parse_config_groups(settings, where)
            names = settings.get("ignore")
            ignore = tuple(map(str, names)) if isinstance(names, list) else ()
        else:
            _check_supported(settings, where)
            groups = (ConfigGroup(format=_gptq_or_awq_format(settings)),)
        if head_and_vision not in (None, "int8"):
            raise CheckpointError(
                f"{where}: {HEAD_AND_VISION_KEY} of quantization_config is {head_and_vision!r}, "
                "must be 'int8'"
            )
        return cls(method=method, groups=groups, ignore=ignore, head_and_vision=head_and_vision)  # type: ignore[arg-type]  # checked above

    def to_dict(self) -> dict[str, Any]:
        """Return `quantization_config` as llm-compressor spells it; of compressed-tensors only."""
        assert self.method == COMPRESSED_TENSORS, "other formats are read, but not written"
        packings = list(dict.fromkeys(format_.packing for format_ in self.formats))
        extra = {HEAD_AND_VISION_KEY: self.head_and_vision} if self.head_and_vision else {}
        return {
            "quant_method": self.method,
            "format": packings[0] if len(packings) == 1 else MIXED_PRECISION,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": group.to_dict() for number, group in enumerate(self.groups)
            },
            "ignore": list(self.ignore),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **extra,
        }

    def describe(self) -> str:
        """Return the formats in words, for messages."""
        prefix = f"{self.method}: " if self.method == COMPRESSED_TENSORS else ""
        return prefix + " and ".join(dict.fromkeys(format_.describe() for format_ in self.formats))


def _gptq_or_awq_format(settings: Mapping[str, Any]) -> PackedFormat:
    """Return the format of checked settings."""
    is_gptq = settings["quant_method"] == "gptq"
    return PackedFormat(
        packing="gptq" if is_gptq else "awq",
        bits=settings["bits"],
        group_size=settings["group_size"],
        is_symmetric=is_gptq and bool(settings.get("sym", True)),
        has_contiguous_groups=not (is_gptq and settings.get("desc_act", False)),
        stores_zero_minus_one=is_gptq and settings.get("checkpoint_format") != "gptq_v2",
    )


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
