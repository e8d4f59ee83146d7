"""Contents of messages: where media go without tags, tags beside items, items with options."""

from __future__ import annotations

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
        text("first"),
        {"type": "image", "image": "a"},
        text("then"),
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


def test_a_tag_is_text_without_media_columns_unless_beside_an_image() -> None:
    assert parse(chat("the tag <image>")).messages[0]["content"] == "the tag <image>"
    item = {"type": "image", "image": "a.png"}
    assert "use one of the two" in error_of(chat([item, text("<image>q")]))
