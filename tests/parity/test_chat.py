"""Chat template: text equals the official Jinja template, ids equal those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.processor.chat_template import render, tokenize
from qwen2vl.processor.messages import parse_messages
from qwen2vl.processor.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer, tiny_tokenizer_dir

# chat_template.json of the official repositories.
OFFICIAL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(OFFICIAL)

texts = st.text(max_size=12) | st.sampled_from(
    ["\n\nHello", " two  spaces ", "it's 2024", "<|box_start|>(1,2)<|box_end|>", "{{ a }}{% b %}"]
    + ["\u4f60\u597d", "e\u0301", "\u273fRESULT\u273f: x\n\u273fRETURN\u273f"]
)
items = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, texts),
    st.builds(lambda t: {"text": t}, texts),
    st.sampled_from(
        [
            {"type": "image", "image": "a.png"},
            {"type": "image", "url": "a.png"},
            {"image": "a.png", "max_pixels": 50176},
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"image_url": "a.png"},
            {"type": "video", "video": "a.mp4", "fps": 1.0},
            {"video": ["1.png", "2.png"]},
        ]
    ),
)
contents = st.text(min_size=1, max_size=20) | st.lists(items, min_size=1, max_size=5)
conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": contents}
    ),
    min_size=1,
    max_size=5,
)


def rendered_text(messages: list[dict[str, Any]], **options: Any) -> str:
    return "".join(segment.text for segment in render(parse_messages(messages), **options))


@given(conversations, st.booleans(), st.booleans())
def test_rendering_equals_the_official_template(
    messages: list[dict[str, Any]], add_generation_prompt: bool, add_vision_id: bool
) -> None:
    options = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
    assert rendered_text(messages, **options) == template.render(messages=messages, **options)


# Ids: the reference tokenizes the whole rendered string with all special tokens, hence
# allowed_special="all" here.


def assert_same_ids(tokenizer: Tokenizer, reference: Any, messages: list[dict[str, Any]]) -> None:
    segments = render(parse_messages(messages), add_vision_id=True)
    counts = [1] * sum(segment.text.endswith("_pad|>") for segment in segments)
    ids, _ = tokenize(segments, tokenizer, counts, allowed_special="all")
    rendered = template.render(messages=messages, add_generation_prompt=True, add_vision_id=True)
    assert ids == reference(rendered).input_ids


@pytest.fixture(scope="module")
def tiny_reference() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_dir())


@given(conversations)
def test_ids_of_the_byte_tokenizer_equal_transformers(
    tiny_reference: Any, messages: list[dict[str, Any]]
) -> None:
    assert_same_ids(tiny_tokenizer(), tiny_reference, messages)


@pytest.fixture(scope="module")
def official_pair(official_tokenizer_dir: Path) -> tuple[Tokenizer, Any]:
    transformers = pytest.importorskip("transformers")
    return (
        Tokenizer.from_folder(official_tokenizer_dir),
        transformers.AutoTokenizer.from_pretrained(official_tokenizer_dir),
    )


@given(conversations)
def test_ids_of_the_official_tokenizer_equal_transformers(
    official_pair: tuple[Tokenizer, Any], messages: list[dict[str, Any]]
) -> None:
    assert_same_ids(*official_pair, messages)


def test_published_ids_of_a_prompt(official_pair: tuple[Tokenizer, Any]) -> None:
    messages = [{"role": "user", "content": [{"image": "a.png"}, {"text": "Describe this image."}]}]
    ids, _ = tokenize(render(parse_messages(messages)), official_pair[0], [1])
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert ids == system + [
        *(151644, 872, 198, 151652, 151655, 151653, 74785, 419, 2168, 13, 151645, 198),
        *(151644, 77091, 198),
    ]


def test_a_newline_after_the_role_header_merges_into_one_token(
    official_pair: tuple[Tokenizer, Any],
) -> None:
    tokenizer = official_pair[0]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nHello"}]
    ids, mask = tokenize(
        render(parse_messages(messages), add_generation_prompt=False),
        tokenizer,
        [],
        allowed_special="none",
    )
    last_turn = [tokenizer.id_to_bytes(token) for token in ids[-6:]]
    assert last_turn == [b"<|im_start|>", b"assistant", b"\n\n\n", b"Hello", b"<|im_end|>", b"\n"]
    # The token that contains the header's newline is not supervised.
    assert mask[-6:] == [False, False, False, True, True, False]
