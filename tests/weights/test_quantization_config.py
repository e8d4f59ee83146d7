"""Parsing quantization_config, and dequantizing an unpacked matrix."""

from typing import Any

import pytest
import torch

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.quantization_config import QuantizationConfig, QuantizedMatrix

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


def parse(raw: object) -> QuantizationConfig:
    return QuantizationConfig.from_dict(raw, "here")


def test_official_configs() -> None:
    gptq = QuantizationConfig(
        method="gptq", bits=4, group_size=128, is_symmetric=True, stores_zero_minus_one=True
    )
    assert parse(GPTQ) == gptq
    assert parse(GPTQ | {"bits": 8}).bits == 8
    assert parse(AWQ) == QuantizationConfig(method="awq", bits=4, group_size=128)


def test_variants_of_gptq() -> None:
    assert not parse(GPTQ | {"desc_act": True}).has_contiguous_groups
    assert not parse(GPTQ | {"sym": False}).is_symmetric
    assert not parse(GPTQ | {"checkpoint_format": "gptq_v2"}).stores_zero_minus_one
    assert parse(GPTQ | {"group_size": -1}).group_size == -1


@pytest.mark.parametrize("raw", [GPTQ, GPTQ | {"bits": 8, "sym": False}, AWQ])
@pytest.mark.parametrize("head_and_vision", [{}, {"head_and_vision": "int8"}])
def test_to_dict_is_the_inverse_of_from_dict(
    raw: dict[str, Any], head_and_vision: dict[str, str]
) -> None:
    config = parse(raw | head_and_vision)
    assert parse(config.to_dict()) == config
    assert config.head_and_vision == head_and_vision.get("head_and_vision")


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
    ],
)
def test_unsupported_configs_are_refused_by_name(raw: object, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse(raw)


def test_dequantized_matrix_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = QuantizedMatrix(
        ints_OI=torch.randint(0, 16, (3, 8), dtype=torch.uint8, generator=generator),
        scale_GO=torch.rand(2, 3, generator=generator).half(),
        zero_GO=torch.randint(0, 17, (2, 3), dtype=torch.int16, generator=generator),
        group_I=torch.tensor([0, 1, 1, 0, 0, 1, 0, 1]),
    )
    got_OI = matrix.dequantize()
    for o in range(3):
        for i in range(8):
            g = int(matrix.group_I[i])
            scale, zero = float(matrix.scale_GO[g, o]), int(matrix.zero_GO[g, o])
            assert float(got_OI[o, i]) == scale * (int(matrix.ints_OI[o, i]) - zero)
