"""nano in transformers' hands: opened as it is, the same ids, the same pixels, the same answers."""

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
from qwen2vl.geometry import num_tokens
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.synth import Mixture, render, sample
from qwen2vl.weights import find

FOLDER = find("nano")
MAX_BYTES = 12_000_000


@cache
def ours() -> LLM:
    return LLM("nano", device="cpu", dtype="float32")


@cache
def theirs() -> Any:
    """The reference, opened from the same folder; it must miss nothing and warn of nothing."""
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def questions() -> list[Any]:
    mixture = Mixture(weights={"shapes": 1.0, "grounding": 1.0, "two_pictures": 1.0}, split="all")
    specs = [sample(2024, index, mixture) for index in range(12)]
    # No letters: this test must not depend on fonts.
    return [render(s) for s in specs if "text" not in {q.task for q in s.questions}]


@pytest.mark.parametrize("index", range(len(questions())))
def test_transformers_gives_the_same_ids_pixels_and_greedy_text(index: int) -> None:
    messages = questions()[index].prompt
    prompt = ours().processor(messages)
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    pixels = Qwen2VLImageProcessorPil.from_pretrained(FOLDER)(pictures, return_tensors="pt")
    patches_NP = prompt.patches_NP
    assert patches_NP is not None
    assert torch.equal(pixels["pixel_values"], normalize_pixels(patches_NP, ours().config.vision))
    assert [tuple(grid) for grid in pixels["image_grid_thw"].tolist()] == prompt.grids

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for grid in prompt.grids:
        text = text.replace("<|image_pad|>", "<|hole|>" * num_tokens(grid), 1)
    ids = tokenizer(text.replace("<|hole|>", "<|image_pad|>"))["input_ids"]
    assert ids == prompt.input_ids

    made = theirs().generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        mm_token_type_ids=(torch.tensor([ids]) == ours().config.image_token_id).int(),
        **pixels,
        do_sample=False,
        max_new_tokens=64,
    )
    (completion,) = ours().generate(prompt, SamplingParams(temperature=0, max_tokens=64))
    want = made[0, len(ids) :].tolist()
    assert list(completion.token_ids) == want
    assert completion.finish_reason == "stop"


def test_nano_is_small_and_an_ordinary_folder() -> None:
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


def test_the_picture_decides_the_answer() -> None:
    """The same question about a red and a blue square: a model that does not look cannot pass."""
    answers = []
    for color in ((215, 38, 38), (38, 76, 215)):
        picture = np.full((112, 112, 3), 250, np.uint8)
        picture[28:84, 28:84] = color
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What color?"}]
        (completion,) = ours().chat([{"role": "user", "content": content}])
        answers.append(completion.text.strip().lower())
    assert answers == ["red", "blue"]
