"""nano loaded by transformers without changes: equal ids, pixels and greedy output."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.geometry import num_vision_tokens
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.synth import Mixture, SyntheticExample, render, sample
from qwen2vl.weights import resolve_model

FOLDER = resolve_model("nano")
MAX_BYTES = 12_000_000


@cache
def llm() -> LLM:
    return LLM("nano", device="cpu", dtype="float32")


@cache
def reference() -> Any:
    """Load the reference from the same folder, without missing or unexpected keys."""
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def example(index: int) -> SyntheticExample:
    weights = {"shapes": 1.0, "grounding": 1.0, "two_pictures": 1.0}
    return render(sample(2024, index, Mixture(weights=weights, split="all", fonts="bundled")))


@pytest.mark.parametrize("index", range(12))
def test_transformers_gives_the_same_ids_pixels_and_greedy_text(index: int) -> None:
    messages = example(index).prompt
    prompt = llm().processor(messages)
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    pixels = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)(images, return_tensors="pt")
    patches_NP = prompt.patches_NP
    assert patches_NP is not None
    assert torch.equal(pixels["pixel_values"], normalize_pixels(patches_NP, llm().config.vision))
    assert [tuple(grid) for grid in pixels["image_grid_thw"].tolist()] == prompt.grids

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for grid in prompt.grids:
        text = text.replace("<|image_pad|>", "<|hole|>" * num_vision_tokens(grid), 1)
    ids = tokenizer(text.replace("<|hole|>", "<|image_pad|>"))["input_ids"]
    assert ids == prompt.input_ids

    generated = reference().generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        mm_token_type_ids=(torch.tensor([ids]) == llm().config.image_token_id).int(),
        **pixels,
        do_sample=False,
        max_new_tokens=64,
    )
    (completion,) = llm().generate(prompt, SamplingParams(temperature=0, max_tokens=64))
    expected = generated[0, len(ids) :].tolist()
    assert list(completion.token_ids) == expected
    assert completion.finish_reason == "stop"


def test_nano_is_small_and_has_the_standard_files() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= MAX_BYTES
    names = {path.name for path in Path(FOLDER).iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "chat_template.json",
    } <= names


def test_the_image_determines_the_output() -> None:
    """The same question about a red and a blue square: a model that ignores the image fails."""
    outputs = []
    for color in ((215, 38, 38), (38, 76, 215)):
        image = np.full((112, 112, 3), 250, np.uint8)
        image[28:84, 28:84] = color
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What color?"}]
        (completion,) = llm().chat([{"role": "user", "content": content}])
        outputs.append(completion.text.strip().lower())
    assert outputs == ["red", "blue"]
