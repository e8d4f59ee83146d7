"""Forward parity in fp32: tower, merger, logits, packing, cache and greedy text.

Both sides hold the same random weights. "Within 1e-5" is of the largest magnitude.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.geometry import AttnMeta, VisionMeta, text_positions
from qwen2vl.model import KVCache, Qwen2VL
from tests import prompts
from tests.parity.oracle import (
    ReferenceModel,
    ask,
    ask_reference,
    packed,
    random_model,
    relative_error,
    split_by_kind,
    twin,
)
from tests.prompts import Part, Prompt, image, video
from tests.tiny import tiny_config

TOLERANCE = 1e-5

PROMPTS: dict[str, list[Part]] = {
    "text": [23],
    "image": [3, image(4, 6), 4],
    "images of odd sizes": [2, image(2, 14), 1, image(10, 6), 5, image(2, 2), 3],
    "video": [2, video(3, 4, 6), 5],
    "long clip": [2, video(9, 4, 2), 5],
    "images and video": [1, image(6, 4), 3, video(2, 4, 4), image(4, 4), 2, image(2, 8), 6],
}
VISUAL = [name for name in PROMPTS if name != "text"]


def shapes() -> dict[str, Qwen2VLConfig]:
    """The tiny model, with its head tied and not, and with heads in no power of two."""
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
    return model, twin(model, attention)


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
    want = reference.model.visual(patches_NP, grid_thw=torch.tensor(prompt.grids))
    assert relative_error(before_merger[0], want.last_hidden_state) < TOLERANCE
    assert relative_error(vision_MD, want.pooler_output) < TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROMPTS)
@torch.inference_mode()
def test_logits(name: str, shape: str, attention: str) -> None:
    model, reference = pair(shape, attention)
    prompt, patches_NP = case(name, model.config)
    want = ask_reference(reference, prompt, patches_NP, model.config)
    assert relative_error(ask(model, prompt, patches_NP), want) < TOLERANCE


@torch.inference_mode()
def test_packed_sequences_equal_each_alone() -> None:
    model, reference = pair("tied")
    cases = [case(name, model.config, seed) for seed, name in enumerate([*PROMPTS, "text"])]
    drawn, patches = zip(*cases, strict=True)
    logits_TV = model.logits(model(**packed(drawn, patches, model.config)))
    parts = logits_TV.split([len(prompt.ids) for prompt, _ in cases])
    for part, (prompt, patches_NP) in zip(parts, cases, strict=True):
        assert relative_error(part, ask(model, prompt, patches_NP)) < TOLERANCE
        want = ask_reference(reference, prompt, patches_NP, model.config)
        assert relative_error(part, want) < TOLERANCE


@pytest.mark.parametrize("chunks", [[20], [7, 13], [1, 1, 8, 10]])
@torch.inference_mode()
def test_cached_decode_equals_the_reference_without_a_cache(chunks: list[int]) -> None:
    model, reference = pair("tied")
    prompt, patches_NP = case("images and video", model.config)
    total = len(prompt.ids)
    assert total > sum(chunks)
    chunks = [*chunks, *[1] * (total - sum(chunks))]
    got = torch.cat(list(stepwise(model, prompt, patches_NP, chunks)))
    want = ask_reference(reference, prompt, patches_NP, model.config)
    assert relative_error(got, want) < TOLERANCE


def stepwise(model: Qwen2VL, prompt: Prompt, patches_NP: Tensor, chunks: list[int]) -> list[Tensor]:
    """Feed a prompt chunk by chunk over a cache, vision rows encoded before: logits of each."""
    whole = packed([prompt], [patches_NP], model.config)
    vision_MD = model.encode(whole["patches_NP"], whole["vision_meta"])
    cache = KVCache.allocate(model.config.text, len(prompt.ids), torch.float32, "cpu")
    logits: list[Tensor] = []
    for chunk in chunks:
        start, end = cache.length, cache.length + chunk
        inside = (whole["pad_index_M"] >= start) & (whole["pad_index_M"] < end)
        hidden_TD = model(
            whole["input_ids_T"][start:end],
            whole["position_ids_3T"][:, start:end],
            AttnMeta.build([chunk], [end]),
            vision_MD=vision_MD[inside],
            pad_index_M=whole["pad_index_M"][inside] - start,
            caches=[cache],
        )
        logits.append(model.logits(hidden_TD))
    return logits


NUM_GREEDY = 32


@pytest.mark.parametrize("name", ["text", "image", "images and video", "long clip"])
@pytest.mark.parametrize("seed", range(2))
@torch.inference_mode()
def test_greedy_text_is_the_reference_s(name: str, seed: int) -> None:
    model, reference = pair("untied", seed=seed)
    prompt, patches_NP = case(name, model.config, seed)
    ours = greedy(model, prompt, patches_NP)
    theirs, clear = reference_greedy(reference, prompt, patches_NP, model.config)
    # A tie may fall either way; compare up to the first position where the reference hesitates.
    compared = clear.index(False) if False in clear else NUM_GREEDY
    assert compared >= 24
    assert ours[:compared] == theirs[:compared]
    assert len(set(theirs)) > 4, "a constant answer proves nothing"


def greedy(model: Qwen2VL, prompt: Prompt, patches_NP: Tensor) -> list[int]:
    """Decode token by token over our cache: position is index + rope delta."""
    config = model.config
    whole = packed([prompt], [patches_NP], config)
    _, delta = text_positions(prompt.ids, prompt.grids, config)
    cache = KVCache.allocate(config.text, len(prompt.ids) + NUM_GREEDY, torch.float32, "cpu")
    hidden_TD = model(**whole, caches=[cache])
    ids: list[int] = []
    while True:
        ids.append(int(model.logits(hidden_TD[-1:]).argmax()))
        if len(ids) == NUM_GREEDY:
            return ids
        index = cache.length
        hidden_TD = model(
            torch.tensor(ids[-1:]),
            torch.full((3, 1), index + delta),
            AttnMeta.build([1], [index + 1]),
            caches=[cache],
        )


def reference_greedy(
    reference: ReferenceModel, prompt: Prompt, patches_NP: Tensor, config: Qwen2VLConfig
) -> tuple[list[int], list[bool]]:
    """Decode with the reference's cache; also say where its first two choices are apart."""
    position_ids_3T, delta = text_positions(prompt.ids, prompt.grids, config)
    ids: list[int] = []
    clear: list[bool] = []
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
        clear.append(bool(first - second > 1e-4 * scores.std()))
        ids.append(int(scores.argmax()))
        inputs = {
            "input_ids": torch.tensor([ids[-1:]]),
            "position_ids": torch.full((3, 1, 1), length + delta),
        }
    return ids, clear


@torch.inference_mode()
def test_greedy_text_is_what_generate_gives() -> None:
    # transformers' own loop and its own positions, for an image, where they are the paper's.
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
