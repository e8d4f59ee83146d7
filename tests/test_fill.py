"""Quantized folders of other programs load without options and equal their dequantized models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qwen2vl
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.errors import CheckpointError, InputError
from qwen2vl.fill import online_schemes, prequantized_schemes
from qwen2vl.linear.fused import FusedLinearSlice
from qwen2vl.loading import load, load_model
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.int4 import Int4Linear
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.scheme import QuantizedLinear, describe_quantization
from qwen2vl.weights import nonfinite_tensors, open_tensors, read_config
from tests.folders import edit_json
from tests.quantization.test_scheme import logits_of
from tests.quantized_folders import AWQ, GPTQ, W8A8, decoder_linears, w4a16, write_quantized
from tests.tiny import tiny_config, tiny_model

LayerClass = type[nn.Module] | tuple[type[nn.Module], ...]

INT8: LayerClass = Int8Linear
# Stored formats, and the layer that each is loaded into.
FORMATS: list[tuple[dict[str, Any], LayerClass]] = [
    (GPTQ | {"bits": 4, "group_size": 32}, Int4Linear),
    (GPTQ | {"bits": 4, "group_size": 64}, Int4Linear),
    (GPTQ | {"bits": 4, "group_size": -1}, Int4Linear),
    (GPTQ | {"bits": 4, "group_size": 32, "sym": False}, Int4Linear),
    (AWQ | {"bits": 4, "group_size": 32}, Int4Linear),
    (AWQ | {"bits": 4, "group_size": -1}, Int4Linear),
    (GPTQ | {"bits": 8, "group_size": -1}, INT8),
    (GPTQ | {"bits": 8, "group_size": 32}, nn.Linear),
    (GPTQ | {"bits": 8, "group_size": -1, "sym": False}, nn.Linear),
    (GPTQ | {"bits": 4, "group_size": 32, "desc_act": True}, nn.Linear),
    (GPTQ | {"bits": 8, "group_size": 32, "desc_act": True}, nn.Linear),
    (W8A8, INT8),
    (w4a16(32, symmetric=True), Int4Linear),
    (w4a16(32, symmetric=False), Int4Linear),
    (w4a16(64, symmetric=True), Int4Linear),
]


def relative_difference(model: Qwen2VL, plain: Qwen2VL) -> float:
    got_TV, want_TV = logits_of(model), logits_of(plain)
    return float((got_TV - want_TV).norm() / want_TV.norm())


@pytest.mark.parametrize(("settings", "layer_class"), FORMATS)
def test_prequantized_folder_equals_its_dequantized_model(
    tmp_path: Path, settings: dict[str, Any], layer_class: LayerClass
) -> None:
    plain = write_quantized(tmp_path / "model", settings)
    model, _ = load(tmp_path / "model", dtype="float32")
    is_dequantized = layer_class is nn.Linear
    for name, _ in decoder_linears(plain):
        layer = model.get_submodule(name)
        assert isinstance(
            layer.layer if isinstance(layer, FusedLinearSlice) else layer, layer_class
        )
        if isinstance(layer, QuantizedLinear | FusedLinearSlice):
            want_OI = plain.get_submodule(name).weight.detach()  # type: ignore[union-attr]
            # Int4 layers round scales and zero points to bfloat16, int8 layers do not.
            tolerance = 0.02 * float(want_OI.abs().max()) if layer_class is Int4Linear else 0.0
            torch.testing.assert_close(layer.dequantize(), want_OI, rtol=1e-6, atol=tolerance)
    assert model.lm_head is not None
    assert type(model.lm_head) is nn.Linear, "head and vision tower are not quantized"
    assert relative_difference(model, plain) < (1e-5 if is_dequantized else 0.03)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_128_inputs(tmp_path: Path, symmetric: bool) -> None:
    raw = tiny_config(tie_word_embeddings=False).to_dict()
    raw |= {"hidden_size": 128, "intermediate_size": 256}
    raw["vision_config"]["hidden_size"] = 128
    raw["rope_scaling"]["mrope_section"] = [4, 6, 6]
    wide = tiny_model(config=Qwen2VLConfig.from_dict(raw))
    plain = write_quantized(tmp_path / "model", w4a16(128, symmetric=symmetric), model=wide)
    model, _ = load(tmp_path / "model", dtype="float32")
    assert describe_quantization(model) == "model: 14 int4/128"
    assert relative_difference(model, plain) < 0.03


@pytest.mark.parametrize("settings", [W8A8, w4a16(32, symmetric=False)])
def test_names_of_the_nested_layout(tmp_path: Path, settings: dict[str, Any]) -> None:
    """transformers 5 names modules `model.language_model...`, and some programs save these."""
    write_quantized(tmp_path / "model", settings)
    want, _ = load(tmp_path / "model", dtype="float32")
    path = tmp_path / "model" / "model.safetensors"
    nested = {
        f"model.{name}"
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(nested, path)
    got, _ = load(tmp_path / "model", dtype="float32")
    assert describe_quantization(got) == describe_quantization(want)
    assert torch.equal(logits_of(got), logits_of(want))


@pytest.mark.parametrize("settings", [W8A8, w4a16(32, symmetric=True)])
def test_row_major_layers_are_not_fused(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = write_quantized(tmp_path / "model", settings)
    model, _ = load(tmp_path / "model", dtype="float32")
    for name, _ in decoder_linears(plain):
        assert isinstance(model.get_submodule(name), QuantizedLinear)


@pytest.mark.parametrize("settings", [W8A8, w4a16(32, symmetric=False)])
def test_without_kernels_torch_multiplies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setenv("QWEN2VL_KERNELS", "off")
    plain = write_quantized(tmp_path / "model", settings)
    model, _ = load(tmp_path / "model", dtype="float32")
    assert relative_difference(model, plain) < 1e-5


@pytest.mark.parametrize(
    "settings", [FORMATS[0][0], FORMATS[4][0], W8A8, w4a16(32, symmetric=False)]
)
def test_llm_answers_with_a_prequantized_folder(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = write_quantized(tmp_path / "model", settings)
    llm = qwen2vl.LLM(tmp_path / "model", dtype="float32")
    params = qwen2vl.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    (completion,) = llm.chat([{"role": "user", "content": "Hi"}], params)
    plain_llm = qwen2vl.LLM(plain, llm.processor)
    (expected,) = plain_llm.chat([{"role": "user", "content": "Hi"}], params)
    assert completion.token_ids[0] == expected.token_ids[0]


def test_unquantized_layers_are_quantized_on_request(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", AWQ | {"bits": 4, "group_size": 32})
    model, _ = load(tmp_path / "model", dtype="float32", quantize="int8")
    counts = [part.rpartition(" ")[2] for part in describe_quantization(model).split(", ")]
    assert counts[1] == "int4/32"
    assert counts[0].startswith("int8")
    assert counts[2].startswith("int8")


def test_head_and_vision_are_quantized_by_the_folders_config(tmp_path: Path) -> None:
    settings = AWQ | {"bits": 4, "group_size": 32, "head_and_vision": "int8"}
    write_quantized(tmp_path / "model", settings)
    model, _ = load(tmp_path / "model", dtype="float32")
    requested, _ = load(tmp_path / "model", dtype="float32", quantize="int8")
    assert describe_quantization(model) == describe_quantization(requested)
    assert torch.equal(logits_of(model), logits_of(requested))


def test_formats_without_a_kernel_are_dequantized_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantized(tmp_path / "model", GPTQ | {"bits": 8, "group_size": 32, "desc_act": True})
    with caplog.at_level(logging.WARNING, "qwen2vl"):
        load(tmp_path / "model", dtype="float32")
    (record,) = caplog.records
    assert record.getMessage() == (
        "14 layers are stored as GPTQ of 8 bits in groups of 32, out of order, for which there is "
        "no kernel on cpu: they are dequantized, and take more memory"
    )
    model, _ = load(tmp_path / "model", dtype="float32", quantize="int8")
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("method", [AWQ | {"bits": 4, "group_size": 32}, W8A8])
def test_other_devices_dequantize_everything(tmp_path: Path, method: dict[str, Any]) -> None:
    write_quantized(tmp_path / "model", method | {"head_and_vision": "int8"})
    tensors = open_tensors(tmp_path / "model")
    model = tiny_model(config=tiny_config(tie_word_embeddings=False))
    for device in (torch.device("cuda"), torch.device("mps")):
        assert prequantized_schemes(tensors, device) == {}
        assert online_schemes(model, None, tensors, {}, device) == {}
    with pytest.raises(InputError, match="quantize 'int8' computes on the CPU and on NVIDIA GPUs"):
        online_schemes(model, "int8", tensors, {}, torch.device("mps"))


def test_fp8_on_the_cpu_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", AWQ | {"bits": 4, "group_size": 32})
    tensors, model = open_tensors(tmp_path / "model"), tiny_model()
    with pytest.raises(InputError, match="'fp8' computes on NVIDIA GPUs only; use int8 or int4 on"):
        online_schemes(model, "fp8", tensors, {}, torch.device("cpu"))


def test_padded_72b_equals_the_unpadded_model(tmp_path: Path) -> None:
    """The released ones have 29696 in place of 29568 columns, a multiple of the group size."""
    unpadded = write_quantized(tmp_path / "unpadded", GPTQ | {"bits": 4, "group_size": 32})
    raw = read_config(tmp_path / "unpadded").to_dict() | {"intermediate_size": 160}
    padded = tiny_model(config=Qwen2VLConfig.from_dict(raw))
    write_quantized(tmp_path / "padded", GPTQ | {"bits": 4, "group_size": 32}, model=padded)
    unpadded_tensors, padded_tensors = (
        load_file(tmp_path / n / "model.safetensors") for n in ("unpadded", "padded")
    )
    for name, tensor in unpadded_tensors.items():
        if "gate_proj" in name or "up_proj" in name or "down_proj" in name:
            padded_tensor = padded_tensors[name]
            padded_tensor.fill_(0x77777777) if name.endswith("qzeros") else padded_tensor.zero_()
            if name.endswith("qweight"):
                padded_tensor.fill_(-0x77777778)  # eight times 8, the zero point
            if name.endswith("g_idx"):
                padded_tensor.copy_(torch.arange(len(padded_tensor)) // 32)
            padded_tensor[tuple(slice(n) for n in tensor.shape)] = tensor
        else:
            padded_tensors[name] = tensor
    save_file(padded_tensors, tmp_path / "padded" / "model.safetensors")
    model, _ = load(tmp_path / "padded", dtype="float32")
    assert model.config.text.intermediate_size == 160
    assert relative_difference(model, unpadded) < 0.03
    unpadded_quantized, _ = load(tmp_path / "unpadded", dtype="float32")
    assert relative_difference(model, unpadded_quantized) < 1e-5


@pytest.mark.parametrize(
    "settings", [AWQ | {"bits": 4, "group_size": 32}, W8A8, w4a16(32, symmetric=False)]
)
def test_quantized_folder_is_a_mapping_of_dequantized_matrices(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    plain = write_quantized(tmp_path / "model", settings)
    tensors = open_tensors(tmp_path / "model")
    assert set(tensors) == set(plain.state_dict())
    assert len(tensors) == len(plain.state_dict())
    assert not nonfinite_tensors(tensors)
    for name, tensor in plain.state_dict().items():
        assert tensors.info(name).shape == tuple(tensor.shape)
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


# Errors -----------------------------------------------------------------------------------------


def edit_layer(folder: Path, **tensors: Any) -> None:
    """Replace tensors, named with _ for .; None removes one."""
    path = folder / "model.safetensors"
    content = load_file(path)
    for ending, tensor in tensors.items():
        name = f"model.layers.0.self_attn.k_proj.{ending}"
        del content[name]
        if tensor is not None:
            content[name] = tensor
    save_file(content, path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scales": None}, r"k_proj.scales is missing, expected \[2, 32\]; fetch the folder again"),
        ({"qzeros": torch.zeros(1, 4, dtype=torch.int32)}, r"k_proj.qzeros is \[1, 4\], expected"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names group 2 of 2"),
        (
            {"g_idx": torch.arange(64, dtype=torch.int32) % 2},
            "desc_act is false, but there are g_idx out of order; correct config.json",
        ),
    ],
)
def test_damaged_layers_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    write_quantized(tmp_path / "model", GPTQ | {"bits": 4, "group_size": 32})
    edit_layer(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=text):
        load(tmp_path / "model")


def test_asymmetric_zeros_with_sym_true_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", GPTQ | {"bits": 8, "group_size": -1})
    edit_layer(tmp_path / "model", qzeros=torch.zeros(1, 8, dtype=torch.int32))
    with pytest.raises(CheckpointError, match="sym is true, but there are zeros other than 128"):
        load(tmp_path / "model")


def test_nonzero_bias_of_a_biasless_layer_is_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "model", GPTQ | {"bits": 4, "group_size": 32})
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"1 not of this model: .*o_proj.bias"):
        load(tmp_path / "model")


def test_config_that_contradicts_the_tensors_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_quantized(folder, GPTQ | {"bits": 4, "group_size": 32})
    edit_json(folder / "config.json", quantization_config=GPTQ | {"bits": 8, "group_size": 32})
    with pytest.raises(
        CheckpointError, match=r"config.json says GPTQ of 8 bits in groups of 32, b"
    ):
        load(folder)
    edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"but config.json has no quantization_config"):
        load(folder)


def test_config_of_compressed_tensors_that_contradicts_the_tensors_is_refused(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    write_quantized(folder, w4a16(32, symmetric=False))
    edit_json(folder / "config.json", quantization_config=w4a16(64, symmetric=False))
    with pytest.raises(
        CheckpointError,
        match=r"says compressed-tensors: pack-quantized of 4 bits in groups of 64, but model.lay.*"
        r"weight_scale is \[128, 2\], expected \[128, 1\]",
    ):
        load(folder)
    edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"quantized \(model.layers.0.mlp.down_proj.weight_p"):
        load(folder)


@pytest.mark.parametrize("settings", [AWQ | {"bits": 4, "group_size": 32}, W8A8])
def test_config_without_packed_tensors_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    plain = write_quantized(folder, settings)
    save_file(dict(plain.state_dict()), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="but no tensor is packed; fetch the folder again"):
        load(folder)


@pytest.mark.parametrize("settings", [AWQ | {"bits": 4, "group_size": 32}, W8A8])
def test_adapter_cannot_be_merged_into_prequantized_layers(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_quantized(tmp_path / "model", settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}'
    )
    folder = tmp_path / "model"
    with pytest.raises(
        CheckpointError, match=r"cannot be merged into model.layers.0.self_attn.q_p"
    ):
        load_model(folder, read_config(folder), adapter=adapter)
