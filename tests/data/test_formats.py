"""Dialects: the same conversation from each, tags find their media, and options come along."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.data.formats import Conversation, Page, SampleError, read_row

TEXT = {"type": "text", "text": "what?"}
WANTED = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]},
    {"role": "assistant", "content": "a cat"},
]


def read(row: Any) -> Any:
    return read_row(row, "rows.jsonl:1")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": WANTED},
        {
            "messages": [{"role": "user", "content": "<image>what?"}, WANTED[1]],
            "images": ["a.png"],
        },
        {
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": "a cat"},
            ],
            "image": "a.png",
        },
        {
            "conversations": [
                {"role": "user", "content": "<image> what?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": ["a.png"],
        },
        {"texts": [{"user": "what?", "assistant": "a cat"}], "images": ["a.png"]},
    ],
)
def test_every_dialect_says_the_same(row: dict[str, Any]) -> None:
    sample = read(row)
    assert isinstance(sample, Conversation)
    assert list(sample.messages) == WANTED


def test_tags_take_media_in_their_order() -> None:
    value = "<image> and <video> then <image>last"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "ok"}]
    sample = read({"conversations": turns, "image": ["1", "2"], "video": "v"})
    assert [list(part.values())[1] for part in sample.messages[0]["content"]] == [
        "1",
        "and",
        "v",
        "then",
        "2",
        "last",
    ]


def test_system_tools_and_ids_come_along() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"id": 7, "system": "Be short.", "conversations": turns, "tools": '[{"name": "f"}]'}
    sample = read(row)
    assert sample.id == "rows.jsonl:1 (7)"
    assert sample.messages[0] == {"role": "system", "content": "Be short."}
    assert sample.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("given", "item"),
    [
        ("a.png", {"type": "image", "image": "a.png"}),
        (b"raw", {"type": "image", "image": b"raw"}),
        ({"bytes": b"raw", "path": None}, {"type": "image", "image": b"raw"}),
        ({"bytes": None, "path": "a.png"}, {"type": "image", "image": "a.png"}),
        (
            {"image": "a.png", "max_pixels": 3136},
            {"type": "image", "image": "a.png", "max_pixels": 3136},
        ),
    ],
)
def test_media_are_names_bytes_or_items_with_options(given: Any, item: dict[str, Any]) -> None:
    assert read({"text": "<image>x", "image": given}).parts == (item, "x")


def test_a_video_may_be_a_list_of_frames() -> None:
    page = read({"text": "<video>", "videos": [["1.png", "2.png"]]})
    assert page.parts == ({"type": "video", "video": ["1.png", "2.png"]},)


def test_a_page_without_media_is_text_alone_tags_and_all() -> None:
    page = read({"text": "an <image> tag of HTML "})
    assert isinstance(page, Page)
    assert page.parts == ("an <image> tag of HTML ",)


@pytest.mark.parametrize("key", ["text", "caption"])
def test_a_pair_is_a_picture_and_its_words(key: str) -> None:
    assert read({key: "A cat.", "image": "a.png"}).parts == (
        {"type": "image", "image": "a.png"},
        "A cat.",
    )


def test_an_article_keeps_its_order() -> None:
    row = {"texts": ["One.", None, "Two <image>."], "images": [None, "b.png", None]}
    assert read(row).parts == ("One.", {"type": "image", "image": "b.png"}, "Two <image>.")
    assert read({"texts": ["One.", "Two."]}).parts == ("One.", "Two.")
    with pytest.raises(SampleError, match="2 texts beside 1 images") as caught:
        read({"texts": ["One.", "Two."], "images": ["b.png"]})
    assert caught.value.reason == "placeholders"


def test_words_that_look_like_tags_stay_words_where_no_media_are_given() -> None:
    said = [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "x"}]
    assert read({"messages": said}).messages[0]["content"] == "what is <image>?"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"texts": [{"user": "q"}]}, r"texts\[0\] must have user and assistant"),
        ({"conversations": "hello"}, "conversations is 'hello'; it must be a list"),
        ({"conversations": ["hello"]}, r"conversations\[0\] is 'hello', not an object"),
        ({"messages": WANTED, "tools": "{"}, "tools is not JSON"),
    ],
)
def test_what_is_malformed_is_named(row: dict[str, Any], text: str) -> None:
    with pytest.raises(SampleError, match=text) as caught:
        read(row)
    assert caught.value.reason == "messages"
