"""Greedy text beside transformers' `generate`, with the same weights, ids and pixels.

The reference makes its own positions, except where its rule departs from the paper's (a clip with
more frame pairs than rows and columns): there it is handed ours, and run step by step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl.engine import LLM, SamplingParams
from qwen2vl.geometry import text_positions
from qwen2vl.model.vision import normalize_pixels
from qwen2vl.processor.inputs import ModelInput
from tests.parity.oracle import ReferenceModel, random_model, twin
from tests.tiny import tiny_config, tiny_processor

NUM_TOKENS = 32
NEEDED = 24  # of them, in the worst case
MARGIN = 1e-4  # of the logits' deviation: below it either token is right


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames: int) -> np.ndarray:
    return np.stack([picture(112, 84, seed) for seed in range(frames)])


CASES: dict[str, list[np.ndarray]] = {
    "text": [],
    "image": [picture(100, 150)],
    "images of odd sizes": [picture(30, 400), picture(200, 57), picture(28, 28)],
    "video": [clip(4)],
    "images and video": [picture(64, 64), clip(4), picture(90, 31)],
}


@cache
def pair() -> tuple[LLM, ReferenceModel]:
    model = random_model(tiny_config(tie_word_embeddings=False), seed=3)
    return LLM.of(model, tiny_processor()), twin(model, "sdpa")


def ask(media: list[np.ndarray]) -> ModelInput:
    content: list[dict[str, Any]] = [
        {"type": "video", "video": m} if m.ndim == 4 else {"type": "image", "image": m}
        for m in media
    ]
    content.append({"type": "text", "text": "What do you see?"})
    return pair()[0].processor([{"role": "user", "content": content}])


def reference_inputs(prompt: ModelInput) -> dict[str, torch.Tensor]:
    """Say the same in the reference's twin arguments."""
    config = pair()[0].config
    ids = torch.tensor([prompt.input_ids])
    types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types.int(),
    }
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [item for item in prompt.items if item.kind == kind]
        if own:
            patches_NP = torch.cat([item.patches_NP for item in own])
            inputs[pixels] = normalize_pixels(patches_NP, config.vision)
            inputs[grids] = torch.tensor([item.grid for item in own])
    return inputs


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str) -> None:
    llm, reference = pair()
    prompt = ask(CASES[name])
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    (completion,) = llm.generate(prompt, params)
    made = reference.generate(
        **reference_inputs(prompt),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = made.sequences[0, len(prompt.input_ids) :].tolist()
    logits_SV = torch.cat(made.logits)
    best_S2 = logits_SV.topk(2).values
    clear_S = (best_S2[:, 0] - best_S2[:, 1]) > MARGIN * logits_SV.std(dim=-1)
    count = NUM_TOKENS if clear_S.all() else int(clear_S.int().argmin())
    assert count >= NEEDED, "the reference itself hesitates: take another seed"
    assert list(completion.token_ids[:count]) == want[:count]
    assert len(set(want)) > 4, "answers that do not wander prove little"


@torch.inference_mode()
def test_greedy_tokens_after_a_long_clip() -> None:
    """Ten frame pairs of 2 x 2 tokens: text resumes past the last frame, not past the corner."""
    llm, reference = pair()
    frames = np.stack([picture(56, 56, seed) for seed in range(20)])
    prompt = ask([frames])
    (grid,) = prompt.grids
    assert grid.t > max(grid.h, grid.w) // 2
    pixels = {k: v for k, v in reference_inputs(prompt).items() if "video" in k}
    ids = list(prompt.input_ids)
    for _ in range(NUM_TOKENS):
        position_ids_3T, _ = text_positions(ids, prompt.grids, llm.config)
        logits_TV = reference(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            position_ids=position_ids_3T[:, None],
            **pixels,
        ).logits[0]
        best_2 = logits_TV[-1].topk(2).values
        if len(ids) >= len(prompt.input_ids) + NEEDED and best_2[0] - best_2[1] < 1e-3:
            break
        ids.append(int(logits_TV[-1].argmax()))
    want = ids[len(prompt.input_ids) :]
    params = SamplingParams(temperature=0, max_tokens=len(want), ignore_eos=True)
    assert list(llm.generate(prompt, params)[0].token_ids) == want


def test_sampling_habits_of_the_official_checkpoints_are_greedy() -> None:
    """Their generation_config.json asks for sampling with top_k 1: greedy by another name."""
    llm, _ = pair()
    prompt = ask(CASES["image"])
    official = SamplingParams(temperature=0.01, top_k=1, top_p=0.001, max_tokens=NUM_TOKENS)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    assert llm.generate(prompt, official)[0].token_ids == llm.generate(prompt, greedy)[0].token_ids
