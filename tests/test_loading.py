"""A folder becomes a model and its processor, or a refusal before anything large is read."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen2vl.config import PRESETS
from qwen2vl.errors import CapacityError, CheckpointError, ConfigError, InputError
from qwen2vl.linear import prepacked
from qwen2vl.loading import load, load_model, load_processor
from qwen2vl.memory import memory_needed
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import read_config
from qwen2vl.weights.state_dict import PATCH_EMBED
from tests.folders import PIXELS, edit_json, write_tiny
from tests.tiny import tiny_config, tiny_model

GIB = 2**30
room = importlib.import_module("qwen2vl.loading")  # the package's attribute is the function


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "model")
    return tmp_path / "model"


def same_weights(left: Qwen2VL, right: Qwen2VL) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# The way in -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_what_was_saved_is_loaded_to_the_bit(
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


def test_the_processor_is_the_folders(folder: Path) -> None:
    _, processor = load(folder, video_preset="qwen_vl_utils_0_0_8")
    assert processor.pixels == PIXELS
    assert processor.video_preset == "qwen_vl_utils_0_0_8"
    prompt = processor([{"role": "user", "content": "Hi"}])
    assert processor.tokenizer.decode(prompt.input_ids, keep="none").endswith("assistant\n")


def test_a_template_that_is_not_run_is_noted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_json(folder / "chat_template.json", chat_template="{{ messages }}")
    with caplog.at_level(logging.DEBUG, "qwen2vl"):
        load_processor(folder)
    assert "its chat template is not the official one; not used" in caplog.text


def test_pixel_limits_are_the_callers_where_given(folder: Path) -> None:
    _, processor = load(folder, max_pixels=16 * 784)
    assert (processor.pixels.min_pixels, processor.pixels.max_pixels) == (4 * 784, 16 * 784)
    with pytest.raises(ConfigError, match="min_pixels 0 and max_pixels"):
        load(folder, min_pixels=0)


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_casting(tmp_path: Path, stored: str, asked: Any) -> None:
    saved = write_tiny(tmp_path / "model", dtype=getattr(torch, stored))
    model, _ = load(tmp_path / "model", dtype=asked)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(torch, asked)
        want = saved.state_dict()[name].to(getattr(torch, stored)).to(getattr(torch, asked))
        assert torch.equal(parameter, want)


def mapped(folder: Path) -> list[tuple[int, int]]:
    """List where the weights' file lies in memory."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    mine = [line for line in maps if line.endswith(str(folder / "model.safetensors"))]
    ends = [line.split()[0].split("-") for line in mine]
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
def test_files_of_a_changed_model_are_mapped_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: Any
) -> None:
    monkeypatch.setattr(prepacked, "LARGE", 1)
    if quantize is None and not prepacked.can_pack():
        pytest.skip("nothing is packed on this processor")
    folder = tmp_path / "model"
    saved = write_tiny(folder, dtype=torch.bfloat16)
    model, _ = load(folder, dtype="bfloat16", quantize=quantize)
    gc.collect()
    (span,) = mapped(folder)  # once: nothing holds what was read first
    for name, parameter in model.named_parameters():
        assert span[0] <= parameter.data_ptr() < span[1], name
        assert torch.equal(parameter, saved.get_parameter(name).bfloat16()), name


def test_changing_a_loaded_model_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load(folder, dtype="float32")
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_flat_patch_embedding(tmp_path: Path) -> None:
    saved = write_tiny(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[PATCH_EMBED] = tensors[PATCH_EMBED].flatten(1)
    save_file(tensors, path)
    assert same_weights(load(tmp_path / "model", dtype="float32")[0], saved)


# Refusals ---------------------------------------------------------------------------------------


def test_nothing_large_is_read_before_all_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("filled")

    monkeypatch.setattr(room, "fill", fail)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated, 1 of [\d,]+ bytes are missing"):
        load(folder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "tpu0"}, "device 'tpu0' is unknown; use cpu, cuda, cuda:1 or mps"),
        ({"device": "meta"}, "device 'meta': there is none here; use cpu"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown; use auto, float32 or bfloat16"),
        ({"max_model_len": 1}, "max_model_len: got 1, must be from 2 to 32768, the context"),
        ({"max_model_len": 32769}, "max_model_len: got 32769, must be from 2 to 32768"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'cuda': there is none here; use cpu"):
        load(folder, device="cuda")


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    ids = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_json(folder / "config.json", image_token_id=ids["image_token_id"] - 1)
    with pytest.raises(CheckpointError, match=r"<\|image_pad\|> is \d+, config.json wants \d+"):
        load(folder)


def test_a_tokenizer_without_special_tokens(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", added_tokens=[])
    with pytest.raises(CheckpointError, match="special tokens missing"):
        load(folder)


def test_merge_size_must_agree(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", merge_size=4)
    with pytest.raises(ConfigError, match="merge_size in the preprocessing settings is 4, must be"):
        load(folder)


def test_tensors_of_another_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=256)
    with pytest.raises(CheckpointError, match=r"6 misshapen: model.layers.0.mlp.gate_proj.weight"):
        load(folder)


# Memory -----------------------------------------------------------------------------------------


def test_too_little_memory_is_said_with_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_available", lambda _: 2**20)
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
def test_the_ways_out(monkeypatch: pytest.MonkeyPatch, available: int, text: str) -> None:
    monkeypatch.setattr(room, "memory_available", lambda _: available)
    with pytest.raises(CapacityError, match=text):
        room._choose_dtype(PRESETS["2B"], torch.device("cpu"), "float32", 32_768, 12_845_056)


def test_a_quantized_model_needs_less(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    need = memory_needed(config, torch.bfloat16, 100, 0)
    monkeypatch.setattr(room, "memory_available", lambda _: need.total - 1)
    options = {"dtype": "bfloat16", "max_model_len": 100}
    with pytest.raises(CapacityError, match="quantize to int8 or int4, or use a smaller model"):
        load_model(folder, config, **options)  # type: ignore[arg-type]
    for mode in ("int8", "int4"):
        load_model(folder, config, quantize=mode, **options)  # type: ignore[arg-type]
    monkeypatch.setattr(room, "memory_available", lambda _: 2**16)
    with pytest.raises(CapacityError, match="are available; use a smaller model"):
        load_model(folder, config, quantize="int8", **options)  # type: ignore[arg-type]


def test_less_context_needs_less(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(folder)
    need = memory_needed(config, torch.float32, 100, 0)
    monkeypatch.setattr(room, "memory_available", lambda _: need.total)
    load_model(folder, config, dtype="float32", max_model_len=100)
    with pytest.raises(CapacityError):
        load_model(folder, config, dtype="float32", max_model_len=101)


@pytest.mark.parametrize(
    ("native", "available", "want"),
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
    want: torch.dtype,
) -> None:
    monkeypatch.setattr(room, "_has_native_bf16", lambda: native)
    monkeypatch.setattr(room, "memory_available", lambda _: available)
    model, _ = load(folder)
    assert model.head_weight.dtype == want


def test_dtype_auto_gives_way_with_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(folder)
    narrow = memory_needed(
        config, torch.bfloat16, 32_768, PIXELS.max_pixels, packs=prepacked.can_pack()
    )
    monkeypatch.setattr(room, "_has_native_bf16", lambda: False)
    monkeypatch.setattr(room, "memory_available", lambda _: narrow.total)
    model, _ = load(folder)
    assert model.head_weight.dtype == torch.bfloat16
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "dtype auto: float32 needs 0.1 GiB" in record.getMessage()
