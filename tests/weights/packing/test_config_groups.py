"""Schemes of compressed-tensors: those that are run are parsed, others are refused by name."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from qwen2vl.errors import CheckpointError
from qwen2vl.weights.packing.config_groups import parse_config_groups
from tests.quantized_folders import W8A8, w4a16

W4A16 = w4a16(128, symmetric=True)

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
STATIC = {"strategy": "tensor", "dynamic": False}


def with_group(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change the group's weights or activations, or replace other keys of it."""
    changed = deepcopy(settings)
    group = changed["config_groups"]["group_0"]
    for key, value in changes.items():
        is_merged = isinstance(value, dict) and isinstance(group.get(key), dict)
        group[key] = group[key] | value if is_merged else value
    return changed


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"strategy": None, "group_size": -1}},  # implies the strategy
        {"weights": {"actorder": "weight"}},  # only the order of calibration
        {"weights": {"actorder": False}},
        {"format": "int-quantized"},
        {"output_activations": None, "unknown": 1},
    ],
)
def test_variants_that_store_the_same_are_read(changes: dict[str, Any]) -> None:
    plain = parse_config_groups(W8A8, "here")
    assert parse_config_groups(with_group(W8A8, **changes), "here") == plain


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_four_bits(size: int, symmetric: bool) -> None:
    (group,) = parse_config_groups(w4a16(size, symmetric=symmetric), "here")
    assert (group.format.group_size, group.format.is_symmetric) == (size, symmetric)
    assert group.targets == ("Linear",)


def test_groups_of_several_formats() -> None:
    raw = W8A8 | {"format": "mixed-precision"}
    raw["config_groups"] = {
        "group_0": with_group(W8A8, format="int-quantized")["config_groups"]["group_0"],
        "group_1": with_group(W4A16, format="pack-quantized")["config_groups"]["group_0"],
    }
    groups = parse_config_groups(raw, "here")
    assert [group.format.packing for group in groups] == ["int-quantized", "pack-quantized"]
    assert parse_config_groups({**raw, "sparsity_config": {"format": "dense"}}, "here") == groups


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (
            with_group(W8A8 | {"format": "float-quantized"}, weights=FP8, input_activations=FP8),
            r"here: the weights are quantized \(compressed-tensors: float-quantized, weights of "
            r"8-bit float by tensor symmetric, input activations of 8-bit float by tensor "
            r"symmetric dynamic\); of compressed-tensors this library runs W8A8 \(int-quan",
        ),
        (
            with_group(W4A16 | {"format": "nvfp4-pack-quantized"}, weights=NVFP4),
            "nvfp4-pack-quantized, weights of 4-bit float by tensor_group of 16 symmetric",
        ),
        (with_group(W8A8, weights={"strategy": "tensor"}), "weights of 8-bit int by tensor"),
        (with_group(W8A8, weights={"symmetric": False}), "8-bit int by channel asymmetric"),
        (with_group(W8A8, weights={"num_bits": 4}), "weights of 4-bit int by channel"),
        (with_group(W8A8, weights={"dynamic": True}), "by channel symmetric dynamic"),
        (with_group(W8A8, input_activations=STATIC), "input activations of 8-bit int by tensor"),
        (with_group(W8A8, input_activations=None), r"int-quantized, weights of [^,]*symmetric\)"),
        (with_group(W8A8, output_activations=STATIC), "output activations of 8-bit int"),
        (with_group(W4A16, weights={"group_size": 16}), "4-bit int by group of 16"),
        (with_group(W4A16, weights={"group_size": 64.0}), "4-bit int by group of 64.0"),
        (with_group(W4A16, weights={"strategy": "channel", "group_size": -1}), "int by channel"),
        (with_group(W4A16, weights={"num_bits": 8}), "pack-quantized, weights of 8-bit int"),
        (with_group(W4A16, weights={"actorder": "group"}), "symmetric actorder group"),
        (with_group(W4A16, input_activations={"num_bits": 8}), "input activations of 8-bit"),
        (W4A16 | {"format": "marlin-24"}, r"compressed-tensors: marlin-24, weights"),
        (W8A8 | {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        (W8A8 | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        (W8A8 | {"transform_config": {"config_groups": {}}}, "transform_config is set"),
        (W8A8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config sparse-24"),
        (W8A8 | {"config_groups": {}}, "config_groups of quantization_config is missing or empty"),
        (W8A8 | {"config_groups": None}, "config_groups of quantization_config is missing or em"),
        (W8A8 | {"config_groups": {"W8A8": ["Linear"]}}, "W8A8 of config_groups has no weights"),
        (with_group(W8A8, weights=None), "group_0 of config_groups has no weights that say how"),
    ],
)
def test_other_schemes_are_refused_by_name(raw: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_config_groups(raw, "here")
