"""What a GPU's layers demand and become; torchao's own arithmetic where it runs on a CPU."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from qwen2vl.config import PRESETS
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeights, hash_tower
from qwen2vl.errors import InputError
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization import torchao
from qwen2vl.quantization.scheme import HEAD, Kind, describe, gpu_recipe, quantize_layers
from qwen2vl.quantization.torchao import NarrowLinear, check_gpu, narrow_linear
from tests.quantization.test_scheme import logits_of
from tests.tiny import tiny_config, tiny_model

GPU = torch.device("cuda:0")


def on_meta(name: str) -> Qwen2VL:
    with torch.device("meta"):
        return Qwen2VL(PRESETS[name])


def test_int4_is_for_the_decoder() -> None:
    kinds = gpu_recipe(on_meta("2B"), "int4")
    assert len(kinds) == 28 * 7
    assert set(kinds.values()) == {Kind(4, 128, "int4")}


@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_eight_bits_are_for_all(mode: Any) -> None:
    model = on_meta("2B")
    kinds = gpu_recipe(model, mode)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(kinds) == layers | {HEAD}
    assert set(kinds.values()) == {Kind(8, 0, mode)}


def test_widths_that_the_fp8_kernel_does_not_take_stay_whole() -> None:
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    rows = model.head_weight.shape[0]
    assert rows % 16 != 0, "the tiny vocabulary is what shows it"
    assert HEAD not in gpu_recipe(model, "fp8")
    assert "model.layers.0.mlp.up_proj" in gpu_recipe(model, "fp8")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="quantize 'int3' is unknown; use int8, int4 or fp8"):
        gpu_recipe(tiny_model(), "int3")  # type: ignore[arg-type]


def test_padding_of_the_4_bit_kernel_counts_as_memory() -> None:
    """1,536 inputs become 2,048 of half a byte, and 16 groups of two bfloat16 and more."""
    assert Kind(4, 128, "int4").num_bytes(1536, 1536) == 1536 * (1024 + 4 * 16)


@pytest.mark.parametrize(
    ("mode", "capability", "least"),
    [("int8", (7, 0), r"7\.5"), ("int4", (7, 5), r"8\.0"), ("fp8", (8, 6), r"8\.9")],
)
def test_a_gpu_that_is_too_old_is_refused(
    mode: str, capability: tuple[int, int], least: str
) -> None:
    found = r"\.".join(map(str, capability))
    with (
        patch("torch.cuda.get_device_capability", lambda device: capability),
        pytest.raises(InputError, match=f"capability {least}, and that of cuda:0 is {found}"),
    ):
        check_gpu(mode, GPU)


def test_an_absent_torchao_is_named_with_the_way_to_get_it() -> None:
    with (
        patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        patch.object(torchao, "find_spec", lambda name: None),
        pytest.raises(InputError, match=r"not installed; pip install 'qwen2vl\[gpu-quant\]', or"),
    ):
        check_gpu("fp8", GPU)


@pytest.mark.parametrize("mode", ["int4", "fp8"])
def test_other_dtypes_than_bfloat16_are_refused(mode: str) -> None:
    with (
        patch.dict(sys.modules, {"torchao": Anything(), "torchao.quantization": Anything()}),
        pytest.raises(InputError, match="bfloat16 only, got dtype float32; use dtype bfloat16"),
    ):
        narrow_linear(torch.ones(16, 16), None, mode, 16)


class Anything:
    """Stands where torchao is, and is not asked for more than names."""

    def __getattr__(self, name: str) -> Any:
        return None


def narrowed(model: Qwen2VL) -> Qwen2VL:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    for name, kind in gpu_recipe(model, "int8").items():
        quantize_layers(model, [name], kind)
    return model


def test_torchao_rounds_as_a_matrix_of_so_many_levels() -> None:
    pytest.importorskip("torchao", reason="torchao is an extra, qwen2vl[gpu-quant]")
    weight_OI, bias_O = torch.randn(24, 32), torch.randn(24)
    layer = narrow_linear(weight_OI, bias_O, "int8", 0)
    x_TI = torch.randn(5, 32)
    scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
    rounded_OI = (weight_OI / scale_O1).round() * scale_O1
    want_TO = x_TI @ rounded_OI.T + bias_O
    assert (layer(x_TI) - want_TO).norm() / want_TO.norm() < 0.01
    buffers = dict(layer.named_buffers())
    assert buffers["weight_qdata"].dtype == torch.int8
    assert buffers["weight_qdata"].shape == (24, 32)
    assert not list(layer.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_narrowed_model_answers_nearly_as_the_whole_one(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    want_TV = logits_of(tiny_model(config=config))
    model = narrowed(tiny_model(config=config))
    got_TV: Tensor = logits_of(model)
    assert 0 < (got_TV - want_TV).norm() / want_TV.norm() < 0.05
    layers = [m for m in model.modules() if isinstance(m, NarrowLinear)]
    assert len(layers) == len(gpu_recipe(tiny_model(config=config), "int8"))
    assert "lm_head: 1 int8 by torchao" in describe(model)


def test_a_fingerprint_sees_what_torchao_holds() -> None:
    one, other = (narrowed(tiny_model(seed)) for seed in (0, 1))
    assert VisionWeights(one, lasting=False).fingerprint()
    for name, tensor in other.visual.named_parameters():
        tensor.data = one.visual.get_parameter(name).data  # what stayed whole is the same
    biases = {n: b for n, b in one.visual.named_buffers() if n.endswith("bias_O")}
    for name, tensor in biases.items():
        other.visual.get_buffer(name).copy_(tensor)
    assert hash_tower(one.visual) != hash_tower(other.visual)
