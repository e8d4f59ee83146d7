"""GPU schemes and their requirements; torchao's int8 arithmetic, which also runs on a CPU."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.config import PRESETS
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest, hash_vision_tower
from qwen2vl.errors import InputError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization import torchao
from qwen2vl.quantization.scheme import (
    LM_HEAD,
    LayerScheme,
    describe_quantization,
    gpu_layer_schemes,
    quantize_layers,
)
from qwen2vl.quantization.torchao import TorchaoLinear, check_gpu_support, torchao_linear
from tests.quantization.test_scheme import logits_of
from tests.tiny import tiny_config, tiny_model

GPU = torch.device("cuda:0")


def meta_model(name: str) -> Qwen2VL:
    with torch.device("meta"):
        return Qwen2VL(PRESETS[name])


def test_int4_quantizes_the_decoder_only() -> None:
    schemes = gpu_layer_schemes(meta_model("2B"), "int4")
    assert len(schemes) == 28 * 7
    assert set(schemes.values()) == {LayerScheme(4, 128, "int4")}


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_8_bit_modes_quantize_all_linear_layers(mode: Any) -> None:
    model = meta_model("2B")
    schemes = gpu_layer_schemes(model, mode)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(schemes) == layers | {LM_HEAD}
    assert set(schemes.values()) == {LayerScheme(8, 0, mode)}


def test_unaligned_layers_are_not_quantized_to_fp8() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    rows = model.lm_head_weight.shape[0]
    assert rows % 16 != 0, "the tiny vocabulary must not be aligned"
    assert LM_HEAD not in gpu_layer_schemes(model, "fp8")
    assert "model.layers.0.mlp.up_proj" in gpu_layer_schemes(model, "fp8")


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="quantize 'int3' is unknown; use int8, int4 or fp8"):
        gpu_layer_schemes(tiny_model(), "int3")  # type: ignore[arg-type]


def test_padding_of_the_int4_kernel_counts_as_memory() -> None:
    """1,536 inputs become 2,048 of half a byte, and 16 groups of two bfloat16 and more."""
    assert LayerScheme(4, 128, "int4").num_bytes(1536, 1536) == 1536 * (1024 + 4 * 16)


@pytest.mark.parametrize(
    ("mode", "capability", "required"),
    [("int8", (7, 0), r"7\.5"), ("int4", (7, 5), r"8\.0"), ("fp8", (8, 6), r"8\.9")],
)
def test_gpu_below_the_required_capability_is_refused(
    mode: str, capability: tuple[int, int], required: str
) -> None:
    found = r"\.".join(map(str, capability))
    with (
        patch("torch.cuda.get_device_capability", lambda device: capability),
        pytest.raises(InputError, match=f"capability {required}, and that of cuda:0 is {found}"),
    ):
        check_gpu_support(mode, GPU)


def test_missing_torchao_is_reported_with_a_remedy() -> None:
    with (
        patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        patch.object(torchao, "find_spec", lambda name: None),
        pytest.raises(InputError, match=r"not installed; pip install 'qwen2vl\[gpu-quant\]', or"),
    ):
        check_gpu_support("fp8", GPU)


@pytest.mark.parametrize("mode", ["int4", "fp8"])
def test_other_dtypes_than_bfloat16_are_refused(mode: str) -> None:
    with (
        patch.dict(sys.modules, {"torchao": FakeModule(), "torchao.quantization": FakeModule()}),
        pytest.raises(InputError, match="bfloat16 only, got dtype float32; use dtype bfloat16"),
    ):
        torchao_linear(torch.ones(16, 16), None, mode, 16)


class FakeModule:
    """Replaces torchao; only its attributes are imported."""

    def __getattr__(self, name: str) -> Any:
        return None


def quantize_to_int8(model: Qwen2VL) -> Qwen2VL:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    for name, scheme in gpu_layer_schemes(model, "int8").items():
        quantize_layers(model, [name], scheme)
    return model


def test_torchao_int8_equals_per_channel_rounding() -> None:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    weight_OI, bias_O = torch.randn(24, 32), torch.randn(24)
    layer = torchao_linear(weight_OI, bias_O, "int8", 0)
    x_TI = torch.randn(5, 32)
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    dequantized_OI = (weight_OI / scale_O1).round() * scale_O1
    want_TO = x_TI @ dequantized_OI.T + bias_O
    assert (layer(x_TI) - want_TO).norm() / want_TO.norm() < 0.01
    buffers = dict(layer.named_buffers())
    assert buffers["weight_qdata"].dtype == torch.int8
    assert buffers["weight_qdata"].shape == (24, 32)
    assert not list(layer.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_near_those_of_the_unquantized_model(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    want_TV = logits_of(tiny_model(config=config))
    model = quantize_to_int8(tiny_model(config=config))
    got_TV: Tensor = logits_of(model)
    assert 0 < (got_TV - want_TV).norm() / want_TV.norm() < 0.05
    layers = [m for m in model.modules() if isinstance(m, TorchaoLinear)]
    assert len(layers) == len(gpu_layer_schemes(tiny_model(config=config), "int8"))
    assert "lm_head: 1 int8 by torchao" in describe_quantization(model)


def test_weights_digest_covers_torchao_buffers() -> None:
    first, second = (quantize_to_int8(tiny_model(seed)) for seed in (0, 1))
    assert VisionWeightsDigest(first, persistent=False).digest()
    for name, tensor in second.visual.named_parameters():
        tensor.data = first.visual.get_parameter(name).data  # unquantized weights are the same
    biases = {n: b for n, b in first.visual.named_buffers() if n.endswith("bias_O")}
    for name, tensor in biases.items():
        second.visual.get_buffer(name).copy_(tensor)
    assert hash_vision_tower(first.visual) != hash_vision_tower(second.visual)
