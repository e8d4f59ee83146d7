"""Contents of messages: where media go without tags, tags beside items, items with options."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.formats.prepared import error_of, parse
from tests.data.formats.test_media import chat, text


def test_media_that_nothing_refers_to_precede_the_first_message() -> None:
    """As in TRL and ms-swift; LLaVA and LLaMA-Factory need a tag each."""
    messages = [
        {"role": "system", "content": "s"},
        *chat("q")["messages"],
        *chat("r")["messages"],
    ]
    parsed = parse({"messages": messages, "images": ["a.png", "b.png"]}).messages
    assert [item["type"] for item in parsed[1]["content"]] == ["image", "image", "text"]
    assert [parsed[i]["content"] for i in (0, 3)] == ["s", "r"]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert "0 <image> tags for 1 images" in error_of({"conversations": turns, "image": "a.png"})


def test_tags_in_the_texts_of_items_use_the_media() -> None:
    """As in ms-swift, which joins the items of a message."""
    parsed = parse(chat([text("first <image>"), text("then <image>")], images=["a", "b"]))
    assert parsed.messages[0]["content"] == [
        text("first "),
        {"type": "image", "image": "a"},
        text("then "),
        {"type": "image", "image": "b"},
    ]


def test_options_and_embedded_bytes_of_items_are_kept() -> None:
    items = [
        {"type": "image", "image": {"bytes": b"raw", "path": "a.png"}},
        {"type": "image", "image": "", "max_pixels": 3136},
        text("q"),
    ]
    content = parse(chat(items, images=["b.png"])).messages[0]["content"]
    assert content[0] == {"type": "image", "image": b"raw"}
    assert content[1] == {"type": "image", "image": "b.png", "max_pixels": 3136}


TAGGED = "![fig](<image>) and <video>"


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_tags_in_answers_are_text_and_counted(key: str) -> None:
    """As in Qwen's fine-tuning code; LLaMA-Factory refuses such rows (its issue 8440)."""
    for question, columns in (
        ("<image>What?", {"image": "a.png"}),
        ("What?", {"images": []}),
        ("What?", {}),
    ):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": TAGGED}]
        sample = parse({key: turns, **columns})
        assert sample.messages[1]["content"] == TAGGED
        assert len(sample.notes) == 1
    turns[0]["content"] = "one of <image> only"
    error = error_of({key: turns, "images": ["a.png", "b.png"]})
    assert error.endswith("1 <image> tags for 2 images; each needs one (tags in answers are text)")


@pytest.mark.parametrize("items", [[{"type": "image"}], [{"type": "image", "image": "a.png"}]])
def test_tags_in_answers_are_text_beside_items_too(items: list[Any]) -> None:
    columns = {} if "image" in items[0] else {"images": ["a.png"]}
    messages = [
        {"role": "user", "content": items},
        {"role": "assistant", "content": [text("<image>"), text("</image>")]},
    ]
    sample = parse({"messages": messages, **columns})
    assert sample.messages[1] == messages[1]
    assert sample.notes == (
        "the text <image> or <video> in an answer, where it stands for no medium",
    )


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_tag_in_a_prompt_needs_a_medium_in_either_layout(key: str) -> None:
    turns = [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "a"}]
    assert error_of({key: turns, "source": "web"}) == (
        "placeholders: 1 <image> tags for 0 images; each needs one; give them in a column image, "
        "images, video or videos, or remove the tags"
    )
    error = error_of({key: turns, "image_path": "a.png"})
    assert error == (
        "placeholders: the text has <image>, and the row has no images; if the column image_path "
        "has them, rename it, else remove it"
    )


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_tag_in_any_prompt_without_media_columns_is_refused(role: str) -> None:
    messages = [{"role": role, "content": [text("<video>")]}, *chat("q")["messages"]]
    assert "1 <video> tags for 0 videos" in error_of({"messages": messages})


@pytest.mark.parametrize(
    "row",
    [
        {"query": "<image>q", "response": "a"},
        {"instruction": "<image>q", "output": "a"},
        {"prompt": "<image>q", "completion": "a"},
        {"query": "q", "response": "a", "system": "<image>"},
    ],
)
def test_a_tag_in_a_prompt_of_columns_is_refused(row: dict[str, Any]) -> None:
    assert "1 <image> tags for 0 images; each needs one" in error_of(row)


def test_items_with_their_own_image_take_none_of_the_column() -> None:
    for item in ({"type": "image", "image": "a"}, {"type": "image_url", "image_url": {"url": "a"}}):
        error = error_of(chat([item], images=["b"]))
        assert "0 <image> tags for 1 images" in error
        assert "(items with their own image or video take none of the columns)" in error


def test_tags_beside_items_with_their_own_image_are_refused() -> None:
    item = {"type": "image", "image": "a.png"}
    assert "use one of the two" in error_of(chat([item, text("<image>q")]))
