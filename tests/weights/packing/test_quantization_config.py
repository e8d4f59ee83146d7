"""Parsing quantization_config of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.packing.config_groups import ConfigGroup
from qwen2vl.weights.packing.packed_format import PackedFormat
from qwen2vl.weights.packing.quantization_config import QuantizationConfig
from tests.quantized_folders import W8A8, w4a16

# As the released repositories have them.
GPTQ = {
    "bits": 4,
    "damp_percent": 0.1,
    "dataset": None,
    "desc_act": False,
    "group_size": 128,
    "modules_in_block_to_quantize": None,
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": True,
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["visual"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}

INT8 = PackedFormat(packing="int-quantized", bits=8, group_size=-1, is_symmetric=True)
INT4 = PackedFormat(packing="pack-quantized", bits=4, group_size=64)


def parse(raw: object) -> QuantizationConfig:
    return QuantizationConfig.from_dict(raw, "here")


def parse_format(raw: object) -> PackedFormat:
    (packed_format,) = parse(raw).formats
    return packed_format


def test_official_configs() -> None:
    gptq = PackedFormat(
        packing="gptq", bits=4, group_size=128, is_symmetric=True, stores_zero_minus_one=True
    )
    assert parse_format(GPTQ) == gptq
    assert parse_format(GPTQ | {"bits": 8}).bits == 8
    assert parse_format(AWQ) == PackedFormat(packing="awq", bits=4, group_size=128)
    assert parse(AWQ).method == "awq"
    assert parse(AWQ).describe() == "AWQ of 4 bits in groups of 128"


def test_variants_of_gptq() -> None:
    assert not parse_format(GPTQ | {"desc_act": True}).has_contiguous_groups
    assert not parse_format(GPTQ | {"sym": False}).is_symmetric
    assert not parse_format(GPTQ | {"checkpoint_format": "gptq_v2"}).stores_zero_minus_one
    assert parse_format(GPTQ | {"group_size": -1}).group_size == -1


def test_configs_of_llm_compressor() -> None:
    config = parse(W8A8)
    assert (config.method, config.formats) == ("compressed-tensors", (INT8,))
    assert config.ignore == ("re:visual.*", "lm_head")
    assert config.head_and_vision is None
    assert parse_format(w4a16(64, symmetric=False)) == INT4
    assert parse_format(w4a16(32, symmetric=True)).is_symmetric


@pytest.mark.parametrize("head_and_vision", [None, "int8"])
@pytest.mark.parametrize("formats", [(INT8,), (INT4,), (INT4, INT8)])
def test_to_dict_is_the_inverse_of_from_dict(
    formats: tuple[PackedFormat, ...], head_and_vision: Any
) -> None:
    config = QuantizationConfig(
        method="compressed-tensors",
        groups=tuple(ConfigGroup(format=f, targets=(f"re:{f.packing}",)) for f in formats),
        ignore=("lm_head",),
        head_and_vision=head_and_vision,
    )
    raw = config.to_dict()
    assert parse(raw) == config
    packings = [packed_format.packing for packed_format in formats]
    assert raw["format"] == (packings[0] if len(formats) == 1 else "mixed-precision")
    assert [group["format"] for group in raw["config_groups"].values()] == packings
    assert ("head_and_vision" in raw) == (head_and_vision is not None)


def test_description_names_every_format_once() -> None:
    config = QuantizationConfig(
        method="compressed-tensors",
        groups=tuple(ConfigGroup(format=f) for f in (INT4, INT8, INT8)),
    )
    assert config.describe() == (
        "compressed-tensors: pack-quantized of 4 bits in groups of 64 and int-quantized of 8 bits, "
        "a scale for each output"
    )


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            {"quant_method": "bitsandbytes"},
            r"here: the weights are quantized \(BITSANDBYTES\); this",
        ),
        (GPTQ | {"bits": 3}, r"quantized \(GPTQ 3-bit\); this library runs GPTQ of 4 or 8 bits"),
        (AWQ | {"bits": 8}, r"quantized \(AWQ 8-bit\)"),
        (["gptq"], r"quantized \(UNKNOWN\)"),
        (GPTQ | {"group_size": 0}, "group_size of quantization_config is 0, expected a whole"),
        (GPTQ | {"group_size": "128"}, "group_size of quantization_config is '128'"),
        (AWQ | {"version": "gemv"}, "packed as AWQ gemv with zero_point True; this library"),
        (AWQ | {"zero_point": False}, "packed as AWQ gemm with zero_point False"),
        (AWQ | {"head_and_vision": "int2"}, "head_and_vision of quantization_config is 'int2'"),
        (W8A8 | {"head_and_vision": "int2"}, "head_and_vision of quantization_config is 'int2'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(raw: object, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse(raw)
