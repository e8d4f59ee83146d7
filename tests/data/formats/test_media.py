"""Media of a row: empty entries, indices, items in place of tags, placeholders of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.formats.prepared import error_of, parse, prepare, write_pictures

IMAGE = {"type": "image"}
EMPTY: list[Any] = [
    None,
    "",
    [],
    [None],
    [""],
    {"bytes": None, "path": None},
    [{"bytes": None, "path": None}],
    [{"bytes": None, "path": ""}],
    [{"bytes": b"", "path": ""}],
    [{"path": ""}],
]


def chat(content: Any, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    return {"messages": messages, **columns}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("key", ["image", "images", "videos"])
def test_rows_with_empty_media_are_text(key: str, empty: Any) -> None:
    plain = prepare(parse(chat("q"))).input_ids
    for row in (
        chat("q", **{key: empty}),
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            key: empty,
        },
        {"texts": [{"user": "q", "assistant": "a"}], key: empty},
    ):
        assert prepare(parse(row)).input_ids == plain
    assert parse({"text": "q", key: empty}).parts == ("q",)


@pytest.mark.parametrize("empty", EMPTY)
def test_a_tag_or_item_of_empty_media_is_refused_as_missing(empty: Any) -> None:
    expected = "missing: 1 <image> in the text, and the row's images are empty"
    assert error_of(chat("<image>q", images=empty)) == expected
    assert error_of(chat([IMAGE, text("q")], image=empty)) == expected
    assert error_of({"text": "<image>q", "images": empty}) == expected


def test_options_beside_embedded_bytes_are_kept(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    content = (tmp_path / "a.png").read_bytes()
    by_path = parse(chat("<image>q", images=[{"path": "a.png", "max_pixels": 3136}]))
    expected = prepare(by_path, tmp_path).input_ids
    assert len(expected) < len(prepare(parse(chat("<image>q", image=content))).input_ids)
    for source in ({"bytes": content, "path": None}, {"bytes": None, "path": "a.png"}):
        row = chat("<image>q", images=[{**source, "max_pixels": 3136}])
        assert prepare(parse(row), tmp_path).input_ids == expected
    assert "unknown key 'size'" in error_of(chat("<image>q", image={"bytes": content, "size": 3}))


def test_empty_entries_between_others_are_left_out(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    row = chat("<image>q", images=[None, "a.png", {"bytes": None, "path": ""}])
    expected = prepare(parse(chat("<image>q", images=["a.png"])), tmp_path).input_ids
    assert prepare(parse(row), tmp_path).input_ids == expected


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{**IMAGE, "index": 2}, text("q")], "an item of type image is 2, and the row has 2"),
        ([{**IMAGE, "index": -1}, text("q")], "is -1, and the row has 2 images"),
        ([{**IMAGE, "index": True}, text("q")], "is True, and the row has 2 images"),
        ([{**IMAGE, "index": 0}, text("q")], "1 <image> tags for 2 images; each needs one"),
        ([{**IMAGE, "index": 0}, IMAGE, text("q")], "by their index and some in order; use one"),
        ([IMAGE, text("q")], "1 <image> tags for 2 images; each needs one"),
        ([IMAGE, IMAGE, IMAGE, text("q")], "3 <image> tags for 2 images; each needs one"),
        ([{**IMAGE, "image": "c.png"}, text("q")], "0 <image> tags for 2 images; each needs one"),
        ([text("<image>"), text("<image><image>")], "3 <image> tags for 2 images; each needs one"),
        ([IMAGE, text("<image>q")], 'tags beside items such as {"type": "image"}; use one of'),
        ("<image>q", "1 <image> tags for 2 images"),
        ("<video><image><image>q", "1 <video> in the text, and the row's videos are empty"),
        (
            "<image_placeholder>q",
            "the placeholder <image_placeholder>, which would be read as text; write",
        ),
        ("<|vision_start|><|image_pad|><|vision_end|>q", "the placeholder <|image_pad|>, which"),
        ([text("<image_1> q")], "the placeholder <image_1>, which"),
        ("(<image>./</image>)q", "the placeholder </image>, which"),
    ],
)
def test_what_does_not_match_the_media_is_refused(content: Any, error: str) -> None:
    assert error in error_of(chat(content, images=["a.png", "b.png"]))


@pytest.mark.parametrize("kind", ["video", {}, 5])
def test_an_item_of_another_kind_is_refused(kind: Any) -> None:
    row = {"text": "<image>", "images": [{"type": kind, "video": "a.mp4"}]}
    assert "messages: an entry of images has the type" in error_of(row)
    item = {"type": "image_url", "image_url": {"url": "a.png"}}
    assert parse({"text": "<image>", "images": [item]}).parts == ({**item, "type": "image"},)


def test_the_same_index_may_be_used_twice() -> None:
    items = [{**IMAGE, "index": 0}, {**IMAGE, "index": 0}, text("q")]
    content = parse(chat(items, images=["a.png"])).messages[0]["content"]
    assert [item.get("image") for item in content] == ["a.png", "a.png", None]


def test_the_audio_tag_of_a_row_with_that_column_is_refused() -> None:
    assert error_of(chat("<audio>q", audios=[])).startswith("placeholders: the text has <audio>")
    assert parse(chat("<audio>q")).messages[0]["content"] == "<audio>q"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [0, "What?"]),
        ("<image>\n\nWhat?", [0, "\nWhat?"]),
        ("<image>\n<image>\nWhat?", [0, 1, "What?"]),
        ("What?\n<image>", ["What?", 0]),
        ("What?\n<image>\n<image>", ["What?", 0, 1]),
        ("<image>\nor\n<image>", [0, "or", 1]),
        ("<image>\n    code\n", [0, "    code\n"]),
        ("Look at <image> and tell.", ["Look at ", 0, " and tell."]),
        ("1: <image>\n2: <image>\n\nTask: x", ["1: ", 0, "\n2: ", 1, "\n\nTask: x"]),
        ("a\n<image>\nb", ["a\n", 0, "\nb"]),
    ],
)
def test_text_keeps_its_white_space_but_for_line_breaks_of_tags_at_its_ends(
    tmp_path: Path, value: str, parts: list[Any]
) -> None:
    """The prompt is that of the same items at inference."""
    write_pictures(tmp_path)
    images = ["a.png", "b.png"][: value.count("<image>")]
    items = [{**IMAGE, "image": images[p]} if isinstance(p, int) else text(p) for p in parts]
    expected = prepare(parse(chat(items)), tmp_path).input_ids
    rows: list[dict[str, Any]] = [chat(value, images=images)]
    rows.append({"conversations": rows[0]["messages"], "images": images})
    for row in rows:
        assert prepare(parse(row), tmp_path).input_ids == expected
    assert [*parse({"text": value, "images": images}).parts] == [
        {**IMAGE, "image": images[p]} if isinstance(p, int) else p for p in parts
    ]
