"""Forward parity in fp32: tower, merger, logits, packing, cache and greedy text.

Both models have the same random weights. The tolerance 1e-5 is relative to the largest magnitude.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, VisionMeta, mrope_positions
from qwen2vl.model import KVCache, Qwen2VL, SequenceKVCaches
from tests import prompts
from tests.parity.reference import (
    ReferenceModel,
    compute_logits,
    compute_reference_logits,
    pack_prompts,
    random_model,
    relative_error,
    split_by_kind,
    to_reference,
)
from tests.prompts import Part, Prompt, image, video
from tests.tiny import tiny_config

TOLERANCE = 1e-5

PROMPTS: dict[str, list[Part]] = {
    "text": [23],
    "image": [3, image(4, 6), 4],
    "images of odd sizes": [2, image(2, 14), 1, image(10, 6), 5, image(2, 2), 3],
    "video": [2, video(3, 4, 6), 5],
    "long video": [2, video(9, 4, 2), 5],
    "images and video": [1, image(6, 4), 3, video(2, 4, 4), image(4, 4), 2, image(2, 8), 6],
}
VISUAL = [name for name in PROMPTS if name != "text"]


def shapes() -> dict[str, Qwen2VLConfig]:
    """Return tiny configs: tied, untied, and with numbers of heads that are no power of two."""
    tiny = tiny_config()
    odd_text = replace(
        tiny.text,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        mrope_section=(2, 3, 3),
        rms_norm_eps=1e-5,
    )
    odd_vision = replace(tiny.vision, hidden_size=96, embed_dim=60, num_heads=5)
    return {
        "tied": replace(tiny, text=replace(tiny.text, tie_word_embeddings=True)),
        "untied": replace(tiny, text=replace(tiny.text, tie_word_embeddings=False)),
        "odd heads": replace(tiny, text=odd_text, vision=odd_vision),
    }


SHAPES = shapes()


@cache
def pair(shape: str, attention: str = "eager", seed: int = 0) -> tuple[Qwen2VL, Any]:
    model = random_model(SHAPES[shape], seed)
    return model, to_reference(model, attention)


def case(name: str, config: Qwen2VLConfig, seed: int = 0) -> tuple[Prompt, Tensor]:
    prompt = prompts.prompt(PROMPTS[name], config, seed)
    return prompt, prompts.patches(prompt, config, seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VISUAL)
@torch.inference_mode()
def test_tower_and_merger(name: str, shape: str) -> None:
    model, reference = pair(shape)
    prompt, patches_NP = case(name, model.config)
    before_merger: list[Tensor] = []
    handle = model.visual.merger.register_forward_pre_hook(
        lambda _module, args: before_merger.append(args[0])
    )
    vision_MD = model.encode(patches_NP, VisionMeta.build(prompt.grids))
    handle.remove()
    expected = reference.model.visual(patches_NP, grid_thw=torch.tensor(prompt.grids))
    assert relative_error(before_merger[0], expected.last_hidden_state) < TOLERANCE
    assert relative_error(vision_MD, expected.pooler_output) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROMPTS)
@torch.inference_mode()
def test_logits(name: str, shape: str, attention: str) -> None:
    model, reference = pair(shape, attention)
    prompt, patches_NP = case(name, model.config)
    expected = compute_reference_logits(reference, prompt, patches_NP, model.config)
    assert relative_error(compute_logits(model, prompt, patches_NP), expected) < TOLERANCE


@torch.inference_mode()
def test_packed_sequences_equal_each_alone() -> None:
    model, reference = pair("tied")
    cases = [case(name, model.config, seed) for seed, name in enumerate([*PROMPTS, "text"])]
    packed_prompts, patches = zip(*cases, strict=True)
    logits_TV = model.logits(model(**pack_prompts(packed_prompts, patches, model.config)))
    parts = logits_TV.split([len(prompt.ids) for prompt, _ in cases])
    for part, (prompt, patches_NP) in zip(parts, cases, strict=True):
        assert relative_error(part, compute_logits(model, prompt, patches_NP)) < TOLERANCE
        expected = compute_reference_logits(reference, prompt, patches_NP, model.config)
        assert relative_error(part, expected) < TOLERANCE


@pytest.mark.parametrize("chunks", [[20], [7, 13], [1, 1, 8, 10]])
@torch.inference_mode()
def test_cached_decode_equals_the_reference_without_a_cache(chunks: list[int]) -> None:
    model, reference = pair("tied")
    prompt, patches_NP = case("images and video", model.config)
    total = len(prompt.ids)
    assert total > sum(chunks)
    chunks = [*chunks, *[1] * (total - sum(chunks))]
    got = torch.cat(list(chunked_logits(model, prompt, patches_NP, chunks)))
    expected = compute_reference_logits(reference, prompt, patches_NP, model.config)
    assert relative_error(got, expected) < TOLERANCE


def chunked_logits(
    model: Qwen2VL, prompt: Prompt, patches_NP: Tensor, chunks: list[int]
) -> list[Tensor]:
    """Compute the logits of a prompt in chunks over a KV cache, with vision encoded before."""
    inputs = pack_prompts([prompt], [patches_NP], model.config)
    vision_MD = model.encode(inputs["patches_NP"], inputs["vision_meta"])
    cache = KVCache.allocate(model.config.text, len(prompt.ids), torch.float32, "cpu")
    logits: list[Tensor] = []
    for chunk in chunks:
        start, end = cache.length, cache.length + chunk
        in_chunk = (inputs["placeholder_index_M"] >= start) & (inputs["placeholder_index_M"] < end)
        meta = AttnMeta.build([chunk], [end])
        hidden_TD = model(
            inputs["input_ids_T"][start:end],
            inputs["position_ids_3T"][:, start:end],
            meta,
            vision_MD=vision_MD[in_chunk],
            placeholder_index_M=inputs["placeholder_index_M"][in_chunk] - start,
            caches=SequenceKVCaches([cache], meta),
        )
        logits.append(model.logits(hidden_TD))
    return logits


NUM_GREEDY = 32


@pytest.mark.parametrize("name", ["text", "image", "images and video", "long video"])
@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_greedy_tokens_equal_the_reference(name: str, seed: int) -> None:
    model, reference = pair("untied", seed=seed)
    prompt, patches_NP = case(name, model.config, seed)
    own_ids = greedy(model, prompt, patches_NP)
    expected_ids, has_margin = reference_greedy(reference, prompt, patches_NP, model.config)
    # Near-ties may differ; compare up to the first position where the reference has no margin.
    compared = has_margin.index(False) if False in has_margin else NUM_GREEDY
    assert compared >= 24
    assert own_ids[:compared] == expected_ids[:compared]
    assert len(set(expected_ids)) > 4, "a constant output proves nothing"


def greedy(model: Qwen2VL, prompt: Prompt, patches_NP: Tensor) -> list[int]:
    """Decode token by token over the KV cache: position is index + rope_delta."""
    config = model.config
    inputs = pack_prompts([prompt], [patches_NP], config)
    _, delta = mrope_positions(prompt.ids, prompt.grids, config)
    cache = KVCache.allocate(config.text, len(prompt.ids) + NUM_GREEDY, torch.float32, "cpu")
    hidden_TD = model(**inputs, caches=SequenceKVCaches([cache], inputs["meta"]))
    ids: list[int] = []
    while True:
        ids.append(int(model.logits(hidden_TD[-1:]).argmax()))
        if len(ids) == NUM_GREEDY:
            return ids
        index = cache.length
        meta = AttnMeta.build([1], [index + 1])
        hidden_TD = model(
            torch.tensor(ids[-1:]),
            torch.full((3, 1), index + delta),
            meta,
            caches=SequenceKVCaches([cache], meta),
        )


def reference_greedy(
    reference: ReferenceModel, prompt: Prompt, patches_NP: Tensor, config: Qwen2VLConfig
) -> tuple[list[int], list[bool]]:
    """Decode with the reference's cache; also return where its top two logits differ clearly."""
    position_ids_3T, delta = mrope_positions(prompt.ids, prompt.grids, config)
    ids: list[int] = []
    has_margin: list[bool] = []
    inputs = {
        "input_ids": torch.tensor([prompt.ids]),
        "position_ids": position_ids_3T[:, None],
        **split_by_kind(patches_NP, prompt),
    }
    past = None
    while len(ids) < NUM_GREEDY:
        length = len(prompt.ids) + len(ids)
        out = reference(
            **inputs,
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        scores = out.logits[0, -1]
        first, second = scores.topk(2).values
        has_margin.append(bool(first - second > 1e-4 * scores.std()))
        ids.append(int(scores.argmax()))
        inputs = {
            "input_ids": torch.tensor([ids[-1:]]),
            "position_ids": torch.full((3, 1, 1), length + delta),
        }
    return ids, has_margin


@torch.inference_mode()
def test_greedy_tokens_equal_generate() -> None:
    # With transformers' own loop and positions, for an image, where they equal the paper's.
    model, reference = pair("untied")
    prompt, patches_NP = case("image", model.config)
    kinds = [int(token == model.config.image_token_id) for token in prompt.ids]
    out = reference.generate(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([kinds]),
        **split_by_kind(patches_NP, prompt),
        max_new_tokens=NUM_GREEDY,
        min_new_tokens=NUM_GREEDY,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out[0, len(prompt.ids) :].tolist() == greedy(model, prompt, patches_NP)
