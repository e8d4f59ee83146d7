"""A quantized folder loads without options, and equals its source quantized while loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.convert import quantize_folder
from qwen2vl.errors import CheckpointError
from qwen2vl.linear import prepacked
from qwen2vl.loading import load, load_processor
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.quantization.scheme import CPU_MODES, CpuQuantizationMode, describe_quantization
from qwen2vl.weights import read_generation_defaults, read_preprocessor_config
from tests.folders import write_tiny
from tests.quantization.test_scheme import logits_of
from tests.tiny import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def example(folder: Path, text: str) -> ModelInput:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
    return load_processor(folder)(turns, add_generation_prompt=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_quantized_folder_equals_online_quantization(
    tmp_path: Path, mode: CpuQuantizationMode, dtype: torch.dtype, tied: bool
) -> None:
    source, target = tmp_path / "model", tmp_path / "small"
    write_tiny(source, model=tiny_model(config=tiny_config(tie_word_embeddings=tied)), dtype=dtype)
    quantization_config = quantize_folder(source, target, mode)
    assert (quantization_config.method, quantization_config.bits) == {
        "int8": ("gptq", 8),
        "int4": ("awq", 4),
    }[mode]
    name = "float32" if dtype == torch.float32 else "bfloat16"
    quantized, processor = load(target, dtype=name)
    online, _ = load(source, dtype=name, quantize=mode)
    assert describe_quantization(quantized) == describe_quantization(online)
    assert torch.equal(logits_of(quantized), logits_of(online))
    assert processor.config == quantized.config == online.config


@pytest.mark.parametrize("mode", CPU_MODES)
def test_prepacked_layers_equal_online_quantization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: CpuQuantizationMode
) -> None:
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1)
    source, target = tmp_path / "model", tmp_path / "small"
    write_tiny(source, dtype=torch.bfloat16)
    quantize_folder(source, target, mode)
    quantized, _ = load(target, dtype="bfloat16")
    online, _ = load(source, dtype="bfloat16", quantize=mode)
    assert torch.equal(logits_of(quantized), logits_of(online))


def test_config_files_are_written(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "small", "int4")
    assert read_generation_defaults(tmp_path / "small") == read_generation_defaults(folder)
    written, original = (
        read_preprocessor_config(tmp_path / "small"),
        read_preprocessor_config(folder),
    )
    assert written == original
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["visual"],
        "head_and_vision": "int8",
    }


def test_quantized_folders_are_smaller(folder: Path, tmp_path: Path) -> None:
    def size(path: Path) -> int:
        return (path / "model.safetensors").stat().st_size

    quantize_folder(folder, tmp_path / "four", "int4")
    quantize_folder(folder, tmp_path / "eight", "int8")
    assert size(tmp_path / "four") < size(tmp_path / "eight") < size(folder)


def test_calibration_examples_change_int4_weights(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    examples = [example(folder, text) for text in ("one", "two and three", "four, five, six")]
    quantize_folder(folder, tmp_path / "near", "int4")
    quantize_folder(
        folder, tmp_path / "shown", "int4", examples=examples, on_layer=lambda *a: calls.append(a)
    )
    assert calls[0] == ("model.layers.0.self_attn.q_proj", 1, 14)
    assert calls[-1] == ("model.layers.1.mlp.down_proj", 14, 14)
    rtn, _ = load(tmp_path / "near", dtype="float32")
    calibrated, _ = load(tmp_path / "shown", dtype="float32")
    assert describe_quantization(rtn) == describe_quantization(calibrated)
    assert not torch.equal(logits_of(rtn), logits_of(calibrated))


def test_quantized_source_is_refused(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "small", "int4")
    with pytest.raises(
        CheckpointError, match=r"is quantized already \(AWQ of 4 bits\); give the f"
    ):
        quantize_folder(tmp_path / "small", tmp_path / "smaller", "int8")


def test_existing_target_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        quantize_folder(folder, folder, "int4")


def test_widths_that_cannot_be_packed(tmp_path: Path) -> None:
    raw = tiny_config(tie_word_embeddings=True).to_dict()
    raw |= {"hidden_size": 48, "intermediate_size": 50}
    raw["vision_config"]["hidden_size"] = 48
    raw["rope_scaling"]["mrope_section"] = [2, 2, 2]
    write_tiny(tmp_path / "odd", model=tiny_model(config=Qwen2VLConfig.from_dict(raw)))
    with pytest.raises(
        CheckpointError, match="packed in 4 bits: their widths are no multiples of 3"
    ):
        quantize_folder(tmp_path / "odd", tmp_path / "small", "int4")
    quantize_folder(tmp_path / "odd", tmp_path / "small", "int8")  # 48 is a multiple of 4
    quantized, _ = load(tmp_path / "small", dtype="float32")
    online, _ = load(tmp_path / "odd", dtype="float32", quantize="int8")
    assert torch.equal(logits_of(quantized), logits_of(online))
