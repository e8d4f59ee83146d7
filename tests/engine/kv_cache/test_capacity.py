"""Capacity checks: token counts in the error message, and that its remedy works."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine import LLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.kv_cache import capacity
from qwen2vl.engine.kv_cache.capacity import check_context, check_text_fits, fitting_max_pixels
from qwen2vl.errors import CapacityError
from qwen2vl.model import Int8KVCache, KVCache
from qwen2vl.processor.inputs import ModelInput
from tests.tiny import tiny_config, tiny_model, tiny_processor

CONFIG = tiny_config()
Size = tuple[int, int]


def prompt(
    text: str, *sizes: Size, max_pixels: int = 10**8, video: Size | None = None
) -> ModelInput:
    content: list[object] = [
        {"type": "image", "image": np.zeros((*size, 3), np.uint8)} for size in sizes
    ]
    if video:
        content.append({"type": "video", "video": np.zeros((4, *video, 3), np.uint8)})
    processor = tiny_processor(max_pixels=max_pixels)
    return processor([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])


def error_message(prompt_input: ModelInput, max_model_len: int, max_tokens: int = 64) -> str:
    with pytest.raises(CapacityError) as caught:
        check_context(prompt_input, CONFIG, max_model_len=max_model_len, max_tokens=max_tokens)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_prompt_that_leaves_one_token_is_accepted() -> None:
    prompt_input = prompt("Hello")
    check_context(
        prompt_input, CONFIG, max_model_len=len(prompt_input.input_ids) + 1, max_tokens=512
    )


def test_a_prompt_that_fills_the_context_is_rejected() -> None:
    prompt_input = prompt("Hello")
    total = len(prompt_input.input_ids)
    text = error_message(prompt_input, total)
    assert text.startswith(f"the prompt has {total} tokens, which fill the context")
    assert "leave none for the output" in text
    assert "raise max_model_len (this model: up to 32,768)" in text


def test_a_cache_smaller_than_the_context_is_named() -> None:
    prompt_input = prompt("Hello " * 20)
    total = len(prompt_input.input_ids)
    for limit, expected in (
        (64, f"the prompt has {total} tokens, more than 64, the cache (kv_cache_tokens); "),
        (
            total,
            f"the prompt has {total} tokens, which fill the cache (kv_cache_tokens {total}) and ",
        ),
    ):
        with pytest.raises(CapacityError) as caught:
            check_context(
                prompt_input, CONFIG, max_model_len=1000, max_tokens=9, kv_cache_tokens=limit
            )
        assert str(caught.value).startswith(expected)
        assert "raise kv_cache_tokens (this model: up to 32,768)" in str(caught.value)
    check_context(prompt_input, CONFIG, max_model_len=1000, max_tokens=9, kv_cache_tokens=total + 1)
    llm = LLM(tiny_model(), tiny_processor(), engine=EngineConfig(kv_cache_tokens=64))
    with pytest.raises(CapacityError, match="the cache"):
        llm.generate(prompt_input)


@pytest.mark.parametrize(
    ("kv_cache", "bytes_per_token"),
    [(KVCache, 2 * 2 * 2 * 16 * 4), (Int8KVCache, 2 * 2 * 2 * (16 + 4))],
)
@pytest.mark.parametrize(
    ("available", "max_model_len", "tokens"),
    [
        (10**15, None, 16 * 32_768),
        (0, None, 32_768),
        (0, 4096, 4096),  # a GPU allocates all at once, so max_model_len must suffice
        (40_000, 4096, 10_000),  # times the bytes of a token
        (10**15, 4096, 16 * 32_768),
    ],
)
def test_default_kv_cache_size_is_a_quarter_of_memory_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
    available: int,
    max_model_len: int | None,
    tokens: int,
    kv_cache: type[KVCache],
    bytes_per_token: int,
) -> None:
    """The tiny model has 2 layers of 2 heads of 16 channels, in float32."""
    monkeypatch.setattr(capacity, "available_memory", lambda device: available * bytes_per_token)
    blocks = capacity.num_cache_blocks(tiny_model(), None, max_model_len, kv_cache)
    assert blocks == -(-tokens // 32)


def test_text_above_the_models_own_context() -> None:
    prompt_input = prompt("x" * 40_000)
    text = error_message(prompt_input, 32_768)
    assert re.match(r"the prompt has 40,\d+ tokens, more than 32,768, the context", text)
    assert text.endswith("; shorten the text")


def test_image_tokens_are_listed_and_the_remedy_works() -> None:
    prompt_input = prompt("What?", (1400, 1400), (28, 56))
    image_tokens = 50 * 50 + prompt_input.items[1].num_tokens
    num_text_tokens = len(prompt_input.input_ids) - image_tokens
    text = error_message(prompt_input, 1000, max_tokens=100)
    assert text.startswith(
        f"the prompt has {len(prompt_input.input_ids):,} = {num_text_tokens} text + "
        f"{image_tokens:,} image tokens, more than 1,000"
    )
    match = re.search(r"lower max_pixels to ([\d,]+), which leaves (\d+) for the output", text)
    assert match
    assert match[2] == "100"
    smaller = prompt("What?", (1400, 1400), (28, 56), max_pixels=int(match[1].replace(",", "")))
    check_context(smaller, CONFIG, max_model_len=1000, max_tokens=100)
    assert len(smaller.input_ids) + 100 <= 1000


def test_too_many_images_cannot_be_fixed_by_max_pixels() -> None:
    text = error_message(prompt("What?", *[(56, 56)] * 40), 200)
    assert "send fewer images" in text
    assert "max_pixels to" not in text


def test_images_are_not_mentioned_if_the_text_alone_is_too_long() -> None:
    text = error_message(prompt("x" * 40_000, (56, 56), video=(56, 56)), 32_768)
    assert text.endswith("; shorten the text")


def test_videos_are_listed_with_their_own_remedies() -> None:
    prompt_input = prompt("What?", video=(448, 448))
    text = error_message(prompt_input, 100)
    assert f"{prompt_input.video_tokens:,} video tokens" in text
    assert "shorter video" in text


@given(
    sides=st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=4),
    limit=st.integers(4, 300),
)
def test_fitting_max_pixels_is_enough_and_not_wasteful(sides: list[Size], limit: int) -> None:
    sizes = [(28 * h, 28 * w) for h, w in sides]
    prompt_input = prompt("What?", *sizes)
    pixels = fitting_max_pixels(prompt_input, CONFIG, limit)
    counts = [item.num_tokens for item in prompt_input.items]
    if pixels is None:
        assert sum(counts) <= limit or limit // len(counts) < 4 or min(counts) < 4
        return
    max_tokens_per_image = pixels // 28**2
    assert sum(min(count, max_tokens_per_image) for count in counts) <= limit
    assert sum(min(count, max_tokens_per_image + 1) for count in counts) > limit


def test_long_text_is_refused_before_it_is_tokenized() -> None:
    tokenizer = tiny_processor().tokenizer
    check_text_fits(["a" * 65_536], tokenizer, 16)  # short: the exact count is left to others
    check_text_fits(["ab " * 40_000], tokenizer, 120_000)
    with pytest.raises(CapacityError, match=r"150,001 characters of text.* than 16 tokens"):
        check_text_fits(["a" * 150_000, "b"], tokenizer, 16)
    with pytest.raises(CapacityError, match="150,000 characters"):
        check_text_fits(["ab " * 50_000], tokenizer, 30_000)
