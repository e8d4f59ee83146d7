"""A quantized folder loads without options, and equals its source quantized while loading."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2vl import convert
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.convert import _calibration_forward, quantize_folder
from qwen2vl.errors import CapacityError, CheckpointError
from qwen2vl.linear import prepacked
from qwen2vl.linear.cpu.operators import unpack_int4
from qwen2vl.loading import load, load_processor
from qwen2vl.model import Qwen2VL, meta_model
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.quantization.gptq import gptq_quantize_decoder
from qwen2vl.quantization.int4 import Int4Linear, PackedInt4Weight
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.rtn import quantize_groupwise, quantize_per_channel
from qwen2vl.quantization.scheme import (
    CPU_MODES,
    CpuQuantizationMode,
    describe_quantization,
    layer_schemes,
)
from qwen2vl.weights import open_tensors, read_generation_defaults, read_preprocessor_config
from tests.folders import write_tiny
from tests.quantization.test_scheme import logits_of
from tests.quantized_folders import read_quantization_config
from tests.tiny import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parent.parent


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
    assert quantization_config.method == "compressed-tensors"
    assert [packed_format.bits for packed_format in quantization_config.formats] == {
        "int8": [8],
        "int4": [4, 8],
    }[mode]
    name = "float32" if dtype == torch.float32 else "bfloat16"
    quantized, processor = load(target, dtype=name)
    online, _ = load(source, dtype=name, quantize=mode)
    assert describe_quantization(quantized) == describe_quantization(online)
    assert torch.equal(logits_of(quantized), logits_of(online))
    assert processor.config == quantized.config == online.config


@pytest.mark.parametrize("mode", CPU_MODES)
def test_without_kernels_the_folder_computes_nearly_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: CpuQuantizationMode
) -> None:
    quantize_folder(folder, tmp_path / "small", mode)
    want_TV = logits_of(load(tmp_path / "small", dtype="float32")[0])
    monkeypatch.setenv("QWEN2VL_KERNELS", "off")
    got_TV = logits_of(load(tmp_path / "small", dtype="float32")[0])
    assert float((got_TV - want_TV).norm() / want_TV.norm()) < 0.02
    online, _ = load(folder, dtype="float32", quantize=mode)
    torch.testing.assert_close(got_TV, logits_of(online), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("mode", CPU_MODES)
def test_quantized_layers_lie_in_the_mapped_file(tmp_path: Path, mode: CpuQuantizationMode) -> None:
    source, target = tmp_path / "model", tmp_path / "small"
    write_tiny(source, dtype=torch.bfloat16)
    quantize_folder(source, target, mode)
    model, _ = load(target, dtype="bfloat16")
    path, places = str(target / "model.safetensors"), []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(path):
            start, _, end = line.split()[0].partition("-")
            places.append(range(int(start, 16), int(end, 16)))

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() in place for place in places)

    for name in open_tensors(target).packed_layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, Int8Linear | Int4Linear), name
        assert is_mapped(layer.weight_OI if isinstance(layer, Int8Linear) else layer.packed)
        assert isinstance(layer, Int8Linear) or is_mapped(layer.scale_OG)
    assert is_mapped(model.model.embed_tokens.weight)


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
    quantization = read_quantization_config(tmp_path / "small")
    assert quantization.keys() >= {"quant_method", "quantization_status", "config_groups"}
    assert quantization["format"] == "mixed-precision"
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["head_and_vision"] == "int8"


@pytest.mark.parametrize("prefix", ["", "model.", "language_model."])  # of other programs
def test_targets_match_exactly_the_layers_of_their_format(
    folder: Path, tmp_path: Path, prefix: str
) -> None:
    config = quantize_folder(folder, tmp_path / "small", "int4")
    layers = open_tensors(tmp_path / "small").packed_layers
    patterns = {
        group.format: re.compile("|".join(t.removeprefix("re:") for t in group.targets))
        for group in config.groups
    }
    for name, _ in tiny_model().named_modules():
        matching = [f for f, pattern in patterns.items() if pattern.match(prefix + name)]
        assert matching == ([layers[name].format] if name in layers else []) or name.endswith(
            "merger.mlp.1"  # an activation, as no other module that is matched
        )


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
        folder,
        tmp_path / "shown",
        "int4",
        examples=examples,
        on_progress=lambda *a: calls.append(a),
    )
    assert calls[:3] == [("calibration", number, 27) for number in (1, 2, 3)]
    assert calls[3] == ("model.layers.0.self_attn.q_proj", 4, 27)
    assert calls[16] == ("model.layers.1.mlp.down_proj", 17, 27)
    assert calls[-1] == ("visual.merger.mlp.2", 27, 27)
    rtn, _ = load(tmp_path / "near", dtype="float32")
    calibrated, _ = load(tmp_path / "shown", dtype="float32")
    assert describe_quantization(rtn) == describe_quantization(calibrated)
    assert not torch.equal(logits_of(rtn), logits_of(calibrated))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", CPU_MODES)
def test_every_tensor_equals_that_of_the_loaded_model(
    tmp_path: Path, mode: CpuQuantizationMode, dtype: torch.dtype
) -> None:
    """Layer by layer from the file, the result is that of a model that is in memory at once."""
    source, target = tmp_path / "model", tmp_path / "small"
    write_tiny(source, dtype=dtype)
    quantize_folder(source, target, mode)
    stored_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    written, plain = open_tensors(target), open_tensors(source)
    for name, tensor in plain.items():
        weight = tensor.to(stored_dtype)
        if name.removesuffix(".weight") not in written.packed_layers:
            assert written[name].dtype == stored_dtype
            assert torch.equal(written[name], weight), name
            continue
        quantized = (
            quantize_groupwise(weight, 32)
            if mode == "int4" and name.startswith("model.")
            else quantize_per_channel(weight)
        )
        assert torch.equal(written[name], quantized.dequantize()), name
    assert set(written) == set(plain)


def test_calibration_equals_that_of_a_loaded_model(folder: Path, tmp_path: Path) -> None:
    examples = [example(folder, text) for text in ("one", "two and three", "four, five, six")]
    quantize_folder(folder, tmp_path / "small", "int4", examples=examples)
    model, _ = load(folder, dtype="float32")
    schemes = {n: s for n, s in layer_schemes(model, "int4").items() if s.bits == 4}
    forwards = [_calibration_forward(e) for e in examples]
    written = open_tensors(tmp_path / "small")
    for name, weight in gptq_quantize_decoder(model, schemes, forwards):
        stored = written.quantized_weight(name)
        assert isinstance(stored, PackedInt4Weight)
        assert torch.equal(unpack_int4(stored.packed), weight.ints_OI), name


def test_too_little_memory_to_calibrate_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "available_memory", lambda _: 150_000)
    with pytest.raises(CapacityError, match=r"layers of 128 inputs needs .* GiB are avai"):
        quantize_folder(folder, tmp_path / "small", "int4", examples=[example(folder, "one")])
    quantize_folder(folder, tmp_path / "small", "int4")  # rounding to nearest needs far less
    assert not list(tmp_path.glob(".*"))


# Peak memory of a process of its own: quantizing a folder, then loading the result and using all of
# its weights. The growth is over what the process takes for a small model.
_MEASURE_PEAKS = """
import json, sys
from pathlib import Path
from qwen2vl.convert import quantize_folder
from qwen2vl.loading import load
from tests.quantization.test_scheme import logits_of

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

source, target, mode, warm_up = sys.argv[1:]
quantize_folder(warm_up, target + "-warm-up", mode)
logits_of(load(target + "-warm-up", dtype="bfloat16")[0])
base = peak()
quantize_folder(source, target, mode)
quantized = peak()
logits_of(load(target, dtype="bfloat16")[0])
print(json.dumps([quantized - base, peak() - base]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc/self/status")
@pytest.mark.parametrize("mode", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_peak_memory_is_that_of_a_layer_and_of_the_result(
    folder: Path, tmp_path: Path, mode: CpuQuantizationMode
) -> None:
    source, target = tmp_path / "wide", tmp_path / "small"
    write_tiny(source, model=wide_model(), dtype=torch.bfloat16)
    command = [sys.executable, "-c", _MEASURE_PEAKS, source, target, mode, folder]
    output = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, cwd=ROOT, check=True, text=True
    ).stdout
    quantizing, loading = json.loads(output.splitlines()[-1])
    source_bytes, target_bytes = (
        (path / "model.safetensors").stat().st_size for path in (source, target)
    )
    assert source_bytes > 200e6
    # A copy of the quantized model would be 0.5 or 0.27, and the source's mapped pages 1.
    assert quantizing < 0.25 * source_bytes
    assert loading < 1.1 * target_bytes + 16e6


def wide_model() -> Qwen2VL:
    """Build a decoder of 12 layers and 220 MB in bfloat16, with random weights."""
    raw: dict[str, Any] = tiny_config().to_dict() | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    }
    raw["vision_config"]["hidden_size"] = 768
    raw["rope_scaling"]["mrope_section"] = [8, 12, 12]
    model = meta_model(Qwen2VLConfig.from_dict(raw)).bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    return model


def test_quantized_source_is_refused(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "small", "int4")
    with pytest.raises(
        CheckpointError,
        match=r"is quantized already \(compressed-tensors: pack-quant.*; give the f",
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
        CheckpointError,
        match=r"odd: no layer .* in 4 bits: its widths, 48 and 50, are no multiples of 32; use i",
    ):
        quantize_folder(tmp_path / "odd", tmp_path / "small", "int4")
    quantize_folder(tmp_path / "odd", tmp_path / "small", "int8")
    quantized, _ = load(tmp_path / "small", dtype="float32")
    online, _ = load(tmp_path / "odd", dtype="float32", quantize="int8")
    assert torch.equal(logits_of(quantized), logits_of(online))


def test_layers_whose_width_does_not_fit_are_quantized_while_loading(tmp_path: Path) -> None:
    raw = tiny_config(tie_word_embeddings=True).to_dict() | {"intermediate_size": 100}
    write_tiny(tmp_path / "odd", model=tiny_model(config=Qwen2VLConfig.from_dict(raw)))
    quantize_folder(tmp_path / "odd", tmp_path / "small", "int4")
    ignored = read_quantization_config(tmp_path / "small")["ignore"]
    assert ignored == ["lm_head", r"re:.*mlp\.down_proj$"]
    assert "model.layers.0.mlp.down_proj" not in open_tensors(tmp_path / "small").packed_layers
    quantized, _ = load(tmp_path / "small", dtype="float32")
    online, _ = load(tmp_path / "odd", dtype="float32", quantize="int4")
    assert "model: 2 int8" in describe_quantization(quantized)
    assert describe_quantization(quantized) == describe_quantization(online)
    assert torch.equal(logits_of(quantized), logits_of(online))
