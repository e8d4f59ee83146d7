"""Packed layers are found by their tensors; those that fit no format are named."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.weights.header import TensorInfo
from qwen2vl.weights.packing.packed_layers import PackedLayer, find_packed_layers
from qwen2vl.weights.packing.quantization_config import QuantizationConfig
from tests.quantized_folders import GPTQ, W8A8, w4a16

LAYER = "model.layers.0.self_attn.k_proj"


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


INT8 = {"weight": info("I8", 24, 50), "weight_scale": info("BF16", 24, 1)}
INT4 = {
    "weight_packed": info("I32", 20, 16),
    "weight_scale": info("BF16", 20, 2),
    "weight_zero_point": info("I32", 3, 2),
    "weight_shape": info("I64", 2),
    "bias": info("BF16", 20),
}
MIXED: dict[str, Any] = {
    "format": "mixed-precision",
    "config_groups": {
        "a": W8A8["config_groups"]["group_0"] | {"format": "int-quantized"},
        **{
            f"b{size}{symmetric}": w4a16(size, symmetric=symmetric)["config_groups"]["group_0"]
            | {"format": "pack-quantized"}
            for size, symmetric in ((128, False), (64, True), (64, False))
        },
    },
}


def find(
    settings: dict[str, Any], parts: dict[str, TensorInfo]
) -> tuple[dict[str, PackedLayer], list[str]]:
    plain = {"model.norm.weight": info("BF16", 50), "visual.proj.bias": info("BF16", 2)}
    infos = plain | {f"{LAYER}.{part}": tensor for part, tensor in parts.items()}
    return find_packed_layers(infos, QuantizationConfig.from_dict(settings, "test"))


@pytest.mark.parametrize("settings", [W8A8, W8A8 | MIXED])
def test_int8_layer(settings: dict[str, Any]) -> None:
    layers, wrong = find(settings, INT8)
    assert not wrong
    assert layers.keys() == {LAYER}
    assert layers[LAYER].shape == (24, 50)
    assert layers[LAYER].parts == ("weight", "weight_scale")
    assert layers[LAYER].format.packing == "int-quantized"


@pytest.mark.parametrize("settings", [w4a16(64, symmetric=False), W8A8 | MIXED])
def test_int4_layer(settings: dict[str, Any]) -> None:
    layers, wrong = find(settings, INT4)
    assert not wrong
    assert layers[LAYER].shape == (20, 128)
    assert "bias" not in layers[LAYER].parts
    assert layers[LAYER].format.group_size == 64
    assert not layers[LAYER].format.is_symmetric


def test_zero_points_tell_symmetric_groups() -> None:
    parts = {part: tensor for part, tensor in INT4.items() if part != "weight_zero_point"}
    layers, wrong = find(W8A8 | MIXED, parts)
    assert not wrong
    assert layers[LAYER].format.is_symmetric


@pytest.mark.parametrize(
    ("settings", "parts", "text"),
    [
        (W8A8, INT4, "weight is missing"),
        (w4a16(64, symmetric=False), INT8, "weight_packed is missing"),
        (GPTQ | {"bits": 4, "group_size": 32}, INT8, "qweight is missing"),
        (w4a16(32, symmetric=False), INT4, "weight_scale is [20, 2], expected [20, 4]"),
        (w4a16(64, symmetric=True), INT4, "weight_zero_point is not of this format"),
        (
            w4a16(128, symmetric=True),
            {
                "weight_packed": info("I32", 20, 24),
                "weight_scale": info("BF16", 20, 2),
                "weight_shape": info("I64", 2),
            },
            " has 192 inputs, not whole groups",
        ),
        (W8A8, INT8 | {"weight": info("BF16", 24, 50)}, "weight is BF16, expected I8"),
        (W8A8, INT8 | {"weight": info("F8_E4M3", 24, 50)}, "weight is F8_E4M3, expected I8"),
        (W8A8, INT8 | {"weight": info("I8", 24)}, "weight is [24], expected a matrix"),
        (W8A8, INT8 | {"weight_scale": info("F32", 1)}, "weight_scale is [1], expected [24, 1]"),
        (W8A8, INT8 | {"input_scale": info("F32", 1)}, "input_scale is not of this format"),
        (
            w4a16(64, symmetric=False),
            INT4 | {"weight_g_idx": info("I32", 128)},
            "weight_g_idx is not of this format",
        ),
    ],
)
def test_tensors_of_another_format_are_named(
    settings: dict[str, Any], parts: dict[str, TensorInfo], text: str
) -> None:
    layers, wrong = find(settings, parts)
    assert not layers
    assert (LAYER + text if text.startswith(" ") else f"{LAYER}.{text}") in wrong


def test_plain_tensors_are_not_packed() -> None:
    assert find(W8A8, {"weight": info("BF16", 24, 50), "bias": info("BF16", 24)}) == ({}, [])
