"""Loading a model and its processor from a folder, and errors before weights are read."""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl import fill, memory
from qwen2vl.config import PRESETS
from qwen2vl.errors import CapacityError, CheckpointError, ConfigError, InputError
from qwen2vl.linear import prepacked
from qwen2vl.loading import load, load_model, load_processor
from qwen2vl.memory import estimate_memory
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import read_config
from qwen2vl.weights.state_dict import PATCH_EMBED_WEIGHT
from tests.folders import PIXELS, edit_json, write_tiny
from tests.tiny import tiny_config, tiny_model

GIB = 2**30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def same_weights(left: Qwen2VL, right: Qwen2VL) -> bool:
    left_state, right_state = left.state_dict(), right.state_dict()
    return left_state.keys() == right_state.keys() and all(
        torch.equal(left_state[k], right_state[k]) for k in left_state
    )


# Loading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_nested", [False, True])
def test_values_of_the_config_are_overridden(folder: Path, is_nested: bool) -> None:
    if is_nested:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        edit_json(folder / "config.json", text_config=raw)
    model, processor = load(folder, hf_overrides={"max_position_embeddings": 77_777})
    assert model.config.text.max_position_embeddings == 77_777
    assert processor.config == model.config
    assert read_config(folder).text.max_position_embeddings < 77_777
    with pytest.raises(ConfigError, match="hidden_size"):
        load(folder, hf_overrides={"hidden_size": -1})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_saved_weights_are_loaded_to_the_bit(
    tmp_path: Path, tied: bool, max_shard_bytes: int
) -> None:
    saved = tiny_model(config=tiny_config(tie_word_embeddings=tied))
    write_tiny(tmp_path / "model", model=saved, max_shard_bytes=max_shard_bytes)
    model, processor = load(tmp_path / "model", dtype="float32")
    assert same_weights(model, saved)
    assert model.config == processor.config == saved.config
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert not list(model.buffers())


def test_processor_uses_the_folders_configs(folder: Path) -> None:
    _, processor = load(folder, video_preset="qwen_vl_utils_0_0_8")
    assert processor.pixels == PIXELS
    assert processor.video_preset == "qwen_vl_utils_0_0_8"
    prompt = processor([{"role": "user", "content": "Hi"}])
    assert processor.tokenizer.decode(prompt.input_ids, keep_special="none").endswith("assistant\n")


def test_foreign_chat_template_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_json(folder / "chat_template.json", chat_template="{{ messages }}")
    with caplog.at_level(logging.DEBUG, "qwen2vl"):
        load_processor(folder)
    assert "its chat template is not the official one; not used" in caplog.text


def test_pixel_limit_arguments_override_the_folder(folder: Path) -> None:
    _, processor = load(folder, max_pixels=16 * 784)
    assert (processor.pixels.min_pixels, processor.pixels.max_pixels) == (4 * 784, 16 * 784)
    _, processor = load(folder, max_pixels=784)
    assert (processor.pixels.min_pixels, processor.pixels.max_pixels) == (784, 784)
    with pytest.raises(ConfigError, match="min_pixels 0 and max_pixels"):
        load(folder, min_pixels=0)


@pytest.mark.parametrize(
    ("stored", "requested"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_weights_are_cast_to_the_requested_dtype(
    tmp_path: Path, stored: str, requested: Any
) -> None:
    saved = write_tiny(tmp_path / "model", dtype=getattr(torch, stored))
    model, _ = load(tmp_path / "model", dtype=requested)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(torch, requested)
        expected = saved.state_dict()[name].to(getattr(torch, stored)).to(getattr(torch, requested))
        assert torch.equal(parameter, expected)


def mapped(folder: Path) -> list[tuple[int, int]]:
    """Return the address ranges where the weights' file is mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    lines_of_file = [line for line in maps if line.endswith(str(folder / "model.safetensors"))]
    ends = [line.split()[0].split("-") for line in lines_of_file]
    return [(int(low, 16), int(high, 16)) for low, high in ends]


reads_maps = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@reads_maps
def test_weights_of_the_same_dtype_are_memory_mapped(folder: Path) -> None:
    model, _ = load(folder, dtype="float32")
    spans = mapped(folder)
    assert spans
    for parameter in model.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)


@reads_maps
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_first_mapping_of_replaced_layers_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: Any
) -> None:
    monkeypatch.setattr(prepacked, "MIN_PREPACK_NUMEL", 1)
    if quantize is None and not prepacked.can_prepack():
        pytest.skip("nothing is packed on this processor")
    folder = tmp_path / "model"
    saved = write_tiny(folder, dtype=torch.bfloat16)
    model, _ = load(folder, dtype="bfloat16", quantize=quantize)
    gc.collect()
    (span,) = mapped(folder)  # once: no tensor uses the first mapping
    for name, parameter in model.named_parameters():
        assert span[0] <= parameter.data_ptr() < span[1], name
        assert torch.equal(parameter, saved.get_parameter(name).bfloat16()), name


def test_changing_a_loaded_model_does_not_change_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load(folder, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_flat_patch_embedding_is_loaded(tmp_path: Path) -> None:
    saved = write_tiny(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[PATCH_EMBED_WEIGHT] = tensors[PATCH_EMBED_WEIGHT].flatten(1)
    save_file(tensors, path)
    assert same_weights(load(tmp_path / "model", dtype="float32")[0], saved)


# Errors -----------------------------------------------------------------------------------------


def test_no_weights_are_read_before_all_checks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("filled")

    monkeypatch.setattr(fill, "fill_parameters", fail)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated, 1 of [\d,]+ bytes are missing"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "tpu0"}, "device 'tpu0' is unknown; use cpu, cuda, cuda:1 or mps"),
        ({"device": "meta"}, "device 'meta': there is none here; use cpu"),
        ({"dtype": "float16"}, "dtype: got 'float16', must be auto, float32 or bfloat16"),
        ({"max_model_len": 1}, "max_model_len: got 1, must be from 2 to 32768, the context"),
        ({"max_model_len": 32769}, "max_model_len: got 32769, must be from 2 to 32768"),
    ],
)
def test_invalid_arguments_are_refused(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'cuda': there is none here; use cpu"):
        load(folder, device="cuda")


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    ids = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_json(folder / "config.json", image_token_id=ids["image_token_id"] - 1)
    with pytest.raises(CheckpointError, match=r"<\|image_pad\|> is \d+, config.json wants \d+"):
        load(folder)


def test_tokenizer_without_special_tokens_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", added_tokens=[])
    (folder / "tokenizer_config.json").unlink()  # which lists them as well
    with pytest.raises(CheckpointError, match="special tokens missing"):
        load(folder)


def test_merge_size_must_agree(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", merge_size=4)
    with pytest.raises(ConfigError, match="merge_size in the preprocessing settings is 4, must be"):
        load(folder)


def test_misshapen_tensors_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"6 misshapen: model.layers.0.mlp.gate_proj.weight"):
        load(folder)


# Memory -----------------------------------------------------------------------------------------


def test_too_little_memory_is_reported_with_sizes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: 2**20)
    with pytest.raises(CapacityError, match=r"the model needs 0.\d GiB in float32 = 0.0 GiB weig"):
        load(folder, dtype="float32")


@pytest.mark.parametrize(
    ("available", "text"),
    [
        (9 * GIB, r"lower max_model_len \(32,768\) or max_pixels \(12,845,056\), or use dtype bf"),
        (
            5 * GIB,
            "but 5.0 GiB are available; use dtype bfloat16, or quantize to int8 or int4, or use a",
        ),
    ],
)
def test_remedies_for_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, available: int, text: str
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: available)
    with pytest.raises(CapacityError, match=text):
        memory.choose_dtype(PRESETS["2B"], torch.device("cpu"), "float32", 32_768, 12_845_056)


def test_quantized_model_needs_less_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    need = estimate_memory(config, torch.bfloat16, 100, 0)
    monkeypatch.setattr(memory, "available_memory", lambda _: need.total - 1)
    options = {"dtype": "bfloat16", "max_model_len": 100}
    with pytest.raises(CapacityError, match="quantize to int8 or int4, or use a smaller model"):
        load_model(folder, config, **options)  # type: ignore[arg-type]
    for mode in ("int8", "int4"):
        load_model(folder, config, quantize=mode, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "available_memory", lambda _: 2**16)
    with pytest.raises(CapacityError, match="are available; use a smaller model"):
        load_model(folder, config, quantize="int8", **options)  # type: ignore[arg-type]


def test_int8_kv_cache_needs_less_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    need = estimate_memory(config, torch.float32, 100, 0)
    monkeypatch.setattr(memory, "available_memory", lambda _: need.total - 1)
    options = {"dtype": "float32", "max_model_len": 100}
    with pytest.raises(
        CapacityError, match=r"max_pixels \(0\), or use kv_cache_dtype int8, or use"
    ):
        load_model(folder, config, **options)  # type: ignore[arg-type]
    load_model(folder, config, kv_cache_dtype="int8", **options)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "available_memory", lambda _: need.total - need.kv_cache)
    with pytest.raises(CapacityError, match=r"max_pixels \(0\), or use dtype bfloat16"):
        load_model(folder, config, **options)  # type: ignore[arg-type]


def test_shorter_context_needs_less_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    need = estimate_memory(config, torch.float32, 100, 0)
    monkeypatch.setattr(memory, "available_memory", lambda _: need.total)
    load_model(folder, config, dtype="float32", max_model_len=100)
    with pytest.raises(CapacityError):
        load_model(folder, config, dtype="float32", max_model_len=101)


@pytest.mark.parametrize(
    ("native", "available", "expected"),
    [
        (True, 10**15, torch.bfloat16),
        (False, 10**15, torch.float32),
        (False, None, torch.float32),
    ],
)
def test_dtype_auto(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    available: int | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(memory, "_has_native_bf16", lambda: native)
    monkeypatch.setattr(memory, "available_memory", lambda _: available)
    model, _ = load(folder)
    assert model.lm_head_weight.dtype == expected


def test_dtype_auto_falls_back_to_bfloat16_with_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(folder)
    bfloat16_need = estimate_memory(
        config, torch.bfloat16, 32_768, PIXELS.max_pixels, prepack=prepacked.can_prepack()
    )
    monkeypatch.setattr(memory, "_has_native_bf16", lambda: False)
    monkeypatch.setattr(memory, "available_memory", lambda _: bfloat16_need.total)
    model, _ = load(folder)
    assert model.lm_head_weight.dtype == torch.bfloat16
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "dtype auto: float32 needs 0.1 GiB" in record.getMessage()
