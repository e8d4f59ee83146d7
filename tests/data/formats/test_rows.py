"""Rows: the same conversation from each layout, the order of columns, and rows of no layout."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.data.formats import Conversation, Document, SampleError
from tests.data.formats.prepared import parse

TEXT = {"type": "text", "text": "what?"}
EXPECTED = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, TEXT]},
    {"role": "assistant", "content": "a cat"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": EXPECTED},
        {
            "messages": [{"role": "user", "content": "<image>what?"}, EXPECTED[1]],
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
                {"role": "user", "content": "<image>what?"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": ["a.png"],
        },
        {"texts": [{"user": "what?", "assistant": "a cat"}], "images": ["a.png"]},
    ],
)
def test_all_formats_parse_to_the_same_conversation(row: dict[str, Any]) -> None:
    sample = parse(row)
    assert isinstance(sample, Conversation)
    assert list(sample.messages) == EXPECTED


def test_tags_consume_media_in_order() -> None:
    value = "<image> and <video> then <image>last"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "ok"}]
    sample = parse({"conversations": turns, "image": ["1", "2"], "video": "v"})
    assert [list(part.values())[1] for part in sample.messages[0]["content"]] == [
        "1",
        " and ",
        "v",
        " then ",
        "2",
        "last",
    ]


def test_system_message_tools_and_id_are_kept() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"id": 7, "system": "Be short.", "conversations": turns, "tools": '[{"name": "f"}]'}
    sample = parse(row)
    assert sample.id == "rows.jsonl:1 (7)"
    assert sample.messages[0] == {"role": "system", "content": "Be short."}
    assert sample.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("value", "item"),
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
def test_media_are_paths_bytes_or_items_with_options(value: Any, item: dict[str, Any]) -> None:
    assert parse({"text": "<image>x", "image": value}).parts == (item, "x")


def test_a_video_may_be_a_list_of_frames() -> None:
    document = parse({"text": "<video>", "videos": [["1.png", "2.png"]]})
    assert document.parts == ({"type": "video", "video": ["1.png", "2.png"]},)


def test_tags_are_text_in_a_document_without_media() -> None:
    document = parse({"text": "an <image> tag of HTML "})
    assert isinstance(document, Document)
    assert document.parts == ("an <image> tag of HTML ",)


@pytest.mark.parametrize("key", ["text", "caption"])
def test_an_image_text_pair_is_an_image_before_its_text(key: str) -> None:
    assert parse({key: "A cat.", "image": "a.png"}).parts == (
        {"type": "image", "image": "a.png"},
        "A cat.",
    )


def test_interleaved_parts_keep_their_order() -> None:
    row = {"texts": ["One.", None, "Two <image>."], "images": [None, "b.png", None]}
    assert parse(row).parts == ("One.", {"type": "image", "image": "b.png"}, "Two <image>.")
    assert parse({"texts": ["One.", "Two."]}).parts == ("One.", "Two.")
    with pytest.raises(SampleError, match="2 texts beside 1 images") as caught:
        parse({"texts": ["One.", "Two."], "images": ["b.png"]})
    assert caught.value.reason == "placeholders"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"texts": [{"user": "q"}]}, r"texts\[0\] is .* must have user and assistant"),
        ({"conversations": "hello"}, "conversations is 'hello'; it must be a list"),
        ({"conversations": ["hello"]}, r"conversations\[0\] is 'hello', not an object"),
        ({"messages": EXPECTED, "tools": "{"}, "tools is not JSON"),
    ],
)
def test_malformed_rows_are_refused(row: dict[str, Any], text: str) -> None:
    with pytest.raises(SampleError, match=text) as caught:
        parse(row)
    assert caught.value.reason == "messages"


def test_the_first_column_decides_and_the_others_are_unused() -> None:
    turns = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    row = {"text": "a", "prompt": "a", "messages": EXPECTED, "conversations": turns, "meta": {}}
    sample = parse(row)
    assert list(sample.messages) == EXPECTED
    assert sample.unused == ("text", "prompt", "conversations")
    assert parse({"text": "a", "prompt": "b"}).unused == ("prompt",)
    assert parse({"caption": "a", "text": None, "url": "b", "id": 3}).unused == ("url",)


def test_a_question_beside_a_caption_is_named_as_unused() -> None:
    row = {"question": "What?", "answer": "red", "caption": "A box.", "image": "a.png"}
    assert parse(row).unused == ("question", "answer")


def test_an_object_that_holds_the_rows_is_described() -> None:
    row = {"messages": EXPECTED}
    with pytest.raises(SampleError, match="an object whose data is a list of 2 objects; if they"):
        parse({"data": [row, row]})
    with pytest.raises(SampleError, match="the row has the keys data, and none of messages"):
        parse({"data": ["a"]})


def test_a_row_that_is_nested_too_deeply_is_refused() -> None:
    value: Any = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(SampleError, match="nested too deeply"):
        parse({"messages": EXPECTED, "meta": value})
