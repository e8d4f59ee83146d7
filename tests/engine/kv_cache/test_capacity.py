"""Prompts that cannot fit: the arithmetic in the message, and that its advice works."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.engine import LLM
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.kv_cache import capacity
from qwen2vl.engine.kv_cache.capacity import check_context, fitting_max_pixels
from qwen2vl.errors import CapacityError
from qwen2vl.processor.inputs import ModelInput
from tests.tiny import tiny_config, tiny_model, tiny_processor

CONFIG = tiny_config()
Size = tuple[int, int]


def prompt(
    text: str, *sizes: Size, max_pixels: int = 10**8, clip: Size | None = None
) -> ModelInput:
    content: list[object] = [
        {"type": "image", "image": np.zeros((*size, 3), np.uint8)} for size in sizes
    ]
    if clip:
        content.append({"type": "video", "video": np.zeros((4, *clip, 3), np.uint8)})
    processor = tiny_processor(max_pixels=max_pixels)
    return processor([{"role": "user", "content": [*content, {"type": "text", "text": text}]}])


def refusal(made: ModelInput, max_model_len: int, max_tokens: int = 64) -> str:
    with pytest.raises(CapacityError) as caught:
        check_context(made, CONFIG, max_model_len=max_model_len, max_tokens=max_tokens)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_prompt_that_leaves_one_token_passes() -> None:
    made = prompt("Hello")
    check_context(made, CONFIG, max_model_len=len(made.input_ids) + 1, max_tokens=512)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    made = prompt("Hello")
    total = len(made.input_ids)
    text = refusal(made, total)
    assert text.startswith(f"prompt {total} = {total} text tokens fill the context")
    assert "no room for an answer" in text
    assert "raise max_model_len (this model: up to 32,768)" in text


def test_a_cache_smaller_than_the_context_is_named() -> None:
    made = prompt("Hello " * 20)
    total = len(made.input_ids)
    for room, want in (
        (64, f"prompt {total} = {total} text tokens > 64, the cache (cache_tokens); "),
        (total, f"prompt {total} = {total} text tokens fill the cache (cache_tokens {total}) and "),
    ):
        with pytest.raises(CapacityError) as caught:
            check_context(made, CONFIG, max_model_len=1000, max_tokens=9, cache_tokens=room)
        assert str(caught.value).startswith(want)
        assert "raise cache_tokens (this model: up to 32,768)" in str(caught.value)
    check_context(made, CONFIG, max_model_len=1000, max_tokens=9, cache_tokens=total + 1)
    llm = LLM.of(tiny_model(), tiny_processor(), engine=EngineConfig(cache_tokens=64))
    with pytest.raises(CapacityError, match="the cache"):
        llm.generate(made)


@pytest.mark.parametrize(
    ("available", "max_model_len", "tokens"),
    [
        (10**15, None, 16 * 32_768),
        (0, None, 32_768),
        (0, 4096, 4096),  # a GPU takes all at once, so what was asked for must be enough
        (4 * 512 * 10_000, 4096, 10_000),
        (10**15, 4096, 16 * 32_768),
    ],
)
def test_the_cache_takes_a_quarter_of_memory_within_bounds(
    monkeypatch: pytest.MonkeyPatch, available: int, max_model_len: int | None, tokens: int
) -> None:
    """The tiny model in float32 takes 512 bytes a token."""
    monkeypatch.setattr(capacity, "memory_available", lambda device: available)
    blocks = capacity.cache_blocks(tiny_model(), None, max_model_len)
    assert blocks == -(-tokens // 32)


def test_text_alone_at_the_models_own_limit() -> None:
    made = prompt("x" * 40_000)
    text = refusal(made, 32_768)
    assert re.match(r"prompt 40,\d+ = 40,\d+ text tokens > 32,768, the context", text)
    assert text.endswith("; shorten the text")


def test_pictures_are_counted_apart_and_the_advice_fits() -> None:
    made = prompt("What?", (1400, 1400), (28, 56))
    image_tokens = 50 * 50 + made.items[1].num_tokens
    words = len(made.input_ids) - image_tokens
    text = refusal(made, 1000, max_tokens=100)
    assert text.startswith(
        f"prompt {len(made.input_ids):,} = {words} text + {image_tokens:,} image tokens > 1,000"
    )
    found = re.search(r"lower max_pixels to ([\d,]+), which leaves (\d+) for the answer", text)
    assert found
    assert found[2] == "100"
    smaller = prompt("What?", (1400, 1400), (28, 56), max_pixels=int(found[1].replace(",", "")))
    check_context(smaller, CONFIG, max_model_len=1000, max_tokens=100)
    assert len(smaller.input_ids) + 100 <= 1000


def test_too_many_pictures_cannot_be_helped_by_shrinking() -> None:
    text = refusal(prompt("What?", *[(56, 56)] * 40), 200)
    assert "give fewer pictures" in text
    assert "max_pixels to" not in text


def test_no_picture_is_blamed_for_text_that_is_too_long_alone() -> None:
    text = refusal(prompt("x" * 40_000, (56, 56), clip=(56, 56)), 32_768)
    assert text.endswith("; shorten the text")


def test_clips_are_named_with_their_own_ways_out() -> None:
    made = prompt("What?", clip=(448, 448))
    text = refusal(made, 100)
    assert f"{made.video_tokens:,} video tokens" in text
    assert "shorter clip" in text


@given(
    sides=st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=4),
    room=st.integers(4, 300),
)
def test_fitting_max_pixels_is_enough_and_not_wasteful(sides: list[Size], room: int) -> None:
    sizes = [(28 * h, 28 * w) for h, w in sides]
    made = prompt("What?", *sizes)
    pixels = fitting_max_pixels(made, CONFIG, room)
    counts = [item.num_tokens for item in made.items]
    if pixels is None:
        assert sum(counts) <= room or room // len(counts) < 4 or min(counts) < 4
        return
    cap = pixels // 28**2
    assert sum(min(count, cap) for count in counts) <= room
    assert sum(min(count, cap + 1) for count in counts) > room
