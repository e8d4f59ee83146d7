"""compressed-tensors against its definition in plain Python, and against the library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qwen2vl.convert import quantize_folder
from qwen2vl.linear.cpu.operators import pack_int4, unpack_int4
from qwen2vl.quantization.int4 import PackedInt4Weight
from qwen2vl.quantization.rtn import PerChannelWeight
from qwen2vl.quantization.scheme import CPU_MODES, CpuQuantizationMode
from qwen2vl.weights import open_tensors
from qwen2vl.weights.packing import compressed_tensors
from qwen2vl.weights.packing.packed_format import PackedFormat
from tests.folders import write_tiny

INT8 = PackedFormat(packing="int-quantized", bits=8, group_size=-1, is_symmetric=True)
INT4 = PackedFormat(packing="pack-quantized", bits=4, group_size=32)
SYMMETRIC = PackedFormat(packing="pack-quantized", bits=4, group_size=32, is_symmetric=True)


def random_int4(seed: int, outputs: int, groups: int) -> PackedInt4Weight:
    generator = torch.Generator().manual_seed(seed)
    ints_OI = torch.randint(0, 16, (outputs, 32 * groups), generator=generator)
    zero_OG = torch.randint(0, 16, (outputs, groups), generator=generator)
    return PackedInt4Weight(
        packed=pack_int4(ints_OI.to(torch.uint8)),
        scale_OG=torch.rand(outputs, groups, generator=generator).half(),
        zero_OG=zero_OG.to(torch.uint8),
    )


def nibble(packed: Tensor, row: int, column: int) -> int:
    """Return the 4-bit integer at a position of the unpacked rows."""
    return (int(packed[row, column // 8]) >> 4 * (column % 8)) & 15


def test_worked_example() -> None:
    ints = torch.tensor([[3, 15, 8, 0, 7, 1, 12, 9]], dtype=torch.uint8)
    weight = PackedInt4Weight(
        packed=pack_int4(ints),
        scale_OG=torch.ones(1, 1, dtype=torch.float16),
        zero_OG=torch.tensor([[5]], dtype=torch.uint8),
    )
    parts = compressed_tensors.pack(weight)
    assert parts["weight_packed"].tolist() == [[0x9C1708F3 - 2**32]]
    assert parts["weight_zero_point"].tolist() == [[5]]  # the other seven outputs are filled up
    assert parts["weight_shape"].tolist() == [1, 8]


@given(seed=st.integers(0, 10**6), outputs=st.integers(1, 40), groups=st.integers(1, 3))
def test_unpack_is_the_inverse_of_pack(seed: int, outputs: int, groups: int) -> None:
    weight = random_int4(seed, outputs, groups)
    parts = compressed_tensors.pack(weight)
    got = compressed_tensors.unpack(parts, INT4)
    assert isinstance(got, PackedInt4Weight)
    assert torch.equal(got.packed, weight.packed)
    assert torch.equal(got.scale_OG, weight.scale_OG)
    assert torch.equal(got.zero_OG, weight.zero_OG)
    shape = compressed_tensors.unpacked_shape(tuple(parts["weight_packed"].shape), INT4)
    assert shape == (outputs, 32 * groups)
    expected = compressed_tensors.part_shapes(shape, INT4)
    assert expected.keys() | {"weight_packed"} == parts.keys()
    assert all(tuple(parts[name].shape) == want for name, want in expected.items())


@given(seed=st.integers(0, 10**6), outputs=st.integers(1, 40), inputs=st.integers(1, 70))
def test_unpack_is_the_inverse_of_pack_for_int8(seed: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = PerChannelWeight(
        ints_OI=torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator),
        scale_O=torch.rand(outputs, generator=generator).half().float(),
    )
    parts = compressed_tensors.pack(weight)
    got = compressed_tensors.unpack(parts, INT8)
    assert isinstance(got, PerChannelWeight)
    assert torch.equal(got.ints_OI, weight.ints_OI)
    assert torch.equal(got.scale_O.float(), weight.scale_O)
    assert compressed_tensors.part_shapes((outputs, inputs), INT8) == {"weight_scale": (outputs, 1)}
    assert compressed_tensors.unpacked_shape((outputs, inputs), INT8) == (outputs, inputs)


@pytest.mark.parametrize("packed_format", [INT4, SYMMETRIC])
def test_every_weight_equals_the_format_definition(packed_format: PackedFormat) -> None:
    parts = compressed_tensors.pack(random_int4(1, 19, 2))
    if packed_format.is_symmetric:
        del parts["weight_zero_point"]
    got_OI = compressed_tensors.unpack(parts, packed_format).dequantize()
    for o in range(19):
        for i in range(64):
            g = i // 32
            zero = 0
            if not packed_format.is_symmetric:
                zero = nibble(parts["weight_zero_point"].T, g, o) - 8
            integer = nibble(parts["weight_packed"], o, i) - 8
            assert float(got_OI[o, i]) == float(parts["weight_scale"][o, g]) * (integer - zero)


def test_integers_and_scales_are_views() -> None:
    parts = compressed_tensors.pack(random_int4(2, 16, 2))
    weight = compressed_tensors.unpack(parts, INT4)
    assert isinstance(weight, PackedInt4Weight)
    assert weight.packed.data_ptr() == parts["weight_packed"].data_ptr()
    assert weight.scale_OG.data_ptr() == parts["weight_scale"].data_ptr()
    assert torch.equal(unpack_int4(weight.packed), unpack_int4(random_int4(2, 16, 2).packed))


# The library itself -----------------------------------------------------------------------------

_REASON = "not installed: pip install --no-deps compressed-tensors loguru"


def read_config(folder: Path) -> Any:
    """Parse a folder's quantization_config with the library."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=_REASON)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return quantization.QuantizationConfig.model_validate(content["quantization_config"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", CPU_MODES)
def test_the_library_decompresses_the_same_weights(
    tmp_path: Path, mode: CpuQuantizationMode
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=_REASON)
    write_tiny(tmp_path / "model", dtype=torch.bfloat16)
    folder = tmp_path / mode
    written = quantize_folder(tmp_path / "model", folder, mode).to_dict()
    config = read_config(folder)
    # Nothing but our own key is dropped, and nothing but defaults is added.
    dumped = config.model_dump()
    assert {key: value for key, value in written.items() if dumped.get(key) != value} == {
        "head_and_vision": "int8"
    }
    assert not any(dumped[key] for key in dumped.keys() - written.keys())
    groups = {str(group.format): group for group in config.config_groups.values()}
    tensors, stored = open_tensors(folder), load_file(folder / "model.safetensors")
    assert tensors.packed_layers
    for name, layer in tensors.packed_layers.items():
        group = groups[layer.format.packing]
        compressor = compressors.BaseCompressor.get_value_from_registry(group.format)
        parts = {part: stored[f"{name}.{part}"] for part in layer.parts}
        weight_OI = compressor.decompress(parts, group)["weight"]
        assert weight_OI.dtype == torch.float16  # computed in the dtype of the scales
        assert torch.equal(weight_OI, tensors[f"{name}.weight"].half()), name


@pytest.mark.slow
def test_transformers_opens_an_int8_folder(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason=_REASON)
    transformers = pytest.importorskip("transformers")
    write_tiny(tmp_path / "model", dtype=torch.bfloat16)
    quantize_folder(tmp_path / "model", tmp_path / "int8", "int8")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "int8", dtype=torch.float16
    )
    with torch.no_grad():
        model(input_ids=torch.arange(32)[None])  # decompresses the weights
    weights = dict(model.named_parameters())
    tensors = open_tensors(tmp_path / "int8")
    for name in tensors.packed_layers:
        (weight_OI,) = (
            weight
            for key, weight in weights.items()
            if key.endswith(f".{name.removeprefix('model.')}.weight")
        )
        want_OI = tensors[f"{name}.weight"].half()
        torch.testing.assert_close(weight_OI.detach(), want_OI, rtol=1e-3, atol=1e-6)
