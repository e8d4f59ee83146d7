"""Checkpoint folders of transformers load here and ours load there, with equal tensors."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers import Qwen2VLForConditionalGeneration as ReferenceModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen2vl.loading import load, load_model
from qwen2vl.model import Qwen2VL
from qwen2vl.weights import GenerationDefaults, check_state_dict, open_tensors, read_config
from tests.folders import PIXELS, write_tiny
from tests.parity.reference import random_model, reference_name, to_reference
from tests.tiny import tiny_config, tiny_tokenizer


def official_state(reference: ReferenceModel) -> dict[str, Tensor]:
    """Return the reference's tensors under official names, without the tied lm_head."""
    state = reference.state_dict()
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def assert_equal(model: Qwen2VL, reference: ReferenceModel) -> None:
    reference_tensors = official_state(reference)
    assert reference_tensors.keys() == {reference_name(name) for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference_tensors[reference_name(name)]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_a_transformers_checkpoint_loads_here(tmp_path: Path, shard: str, tied: bool) -> None:
    reference = to_reference(random_model(tiny_config(tie_word_embeddings=tied)))
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "50KB")
    config = read_config(tmp_path)
    assert config == tiny_config(tie_word_embeddings=tied)
    assert_equal(load_model(tmp_path, config, dtype="float32"), reference)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_our_checkpoint_loads_in_transformers_without_warnings(
    tmp_path: Path, max_shard_bytes: int, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(tiny_config(tie_word_embeddings=tied))
    write_tiny(tmp_path / "model", model=model, max_shard_bytes=max_shard_bytes)
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        reference, info = ReferenceModel.from_pretrained(
            tmp_path / "model", output_loading_info=True, dtype="auto"
        )
    assert not caplog.records
    assert not any(info.values())
    assert reference.dtype == torch.float32
    assert_equal(model, reference)


def test_a_round_trip_through_transformers_changes_nothing(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "ours", model=random_model(tiny_config()))
    reference = ReferenceModel.from_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    config = read_config(tmp_path / "theirs")
    assert config == model.config
    assert_equal(load_model(tmp_path / "theirs", config, dtype="float32"), reference)


def convert_to_4_57_layout(folder: Path) -> None:
    """Rewrite a folder to the layout of transformers 4.52 to 4.57: nested config and keys."""
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    text = {k: raw.pop(k) for k in list(raw) if "vision" not in k and not k.endswith("token_id")}
    text |= {k: raw.pop(k) for k in ("bos_token_id", "eos_token_id")}
    text["rope_scaling"] = {"rope_type": "default"} | text["rope_scaling"] | {"type": "default"}
    head = {"architectures": text.pop("architectures"), "model_type": text.pop("model_type")}
    text["model_type"] = "qwen2_vl_text"
    path.write_text(json.dumps(head | raw | {"text_config": text}), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    nested = {reference_name(name): tensor for name, tensor in tensors.items()}
    save_file(nested, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_the_nested_layout_loads_as_the_same_model_in_both(tmp_path: Path, tied: bool) -> None:
    model = random_model(tiny_config(tie_word_embeddings=tied))
    write_tiny(tmp_path / "model", model=model)
    convert_to_4_57_layout(tmp_path / "model")
    assert "model.visual.merger.ln_q.bias" in load_file(tmp_path / "model" / "model.safetensors")
    loaded, processor = load(tmp_path / "model", dtype="float32")
    assert processor.config == model.config
    check_state_dict(open_tensors(tmp_path / "model"), model.config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert_equal(loaded, ReferenceModel.from_pretrained(tmp_path / "model"))


def test_generation_and_image_settings_agree_with_transformers(tmp_path: Path) -> None:
    generation = GenerationDefaults(do_sample=True, temperature=0.25, top_k=3, top_p=0.5)
    model = write_tiny(tmp_path / "model", generation=generation)
    reference = GenerationConfig.from_pretrained(tmp_path / "model")
    for name in ("do_sample", "temperature", "top_k", "top_p"):
        assert getattr(reference, name) == getattr(generation, name)
    assert reference.eos_token_id == model.config.eos_token_id
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "model")
    assert image_processor.size["shortest_edge"] == PIXELS.min_pixels
    assert image_processor.size["longest_edge"] == PIXELS.max_pixels
    grid = image_processor(Image.new("RGB", (640, 427)), return_tensors="pt")["image_grid_thw"]
    assert int(grid.prod()) * 196 <= PIXELS.max_pixels
    rope = AutoConfig.from_pretrained(tmp_path / "model").text_config.rope_parameters
    assert (rope["mrope_section"], rope["rope_theta"]) == ([2, 3, 3], 1_000_000.0)


def test_the_tokenizer_agrees_with_transformers(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    reference = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(reference).__name__.startswith("Qwen2Tokenizer")
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wie schön, 你?"}]}
    ]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    ids = tiny_tokenizer().encode_text(text, allowed_special="all")
    assert reference(text)["input_ids"] == ids
