"""Documents: continuations of prompts, and media in columns that have no place."""

from __future__ import annotations

from pathlib import Path

from qwen2vl.data.validation_split import sample_digest
from tests.data.formats.prepared import error_of, learned, parse, prepare, write_pictures


def test_only_the_completion_of_a_plain_prompt_is_learned(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    row = {"prompt": "<image> The sky is", "completion": " blue.", "images": ["a.png"]}
    sample = parse(row)
    assert learned(prepare(sample, tmp_path)) == [" blue.<|endoftext|>"]
    whole = parse({"text": "<image> The sky is", "image": "a.png"})
    assert len(learned(prepare(whole, tmp_path))) == 1
    swapped = parse({**row, "prompt": "<image> The sky", "completion": "is blue."})
    assert sample_digest(swapped) != sample_digest(sample)


def test_a_token_of_prompt_and_completion_is_not_learned() -> None:
    prepared = prepare(parse({"prompt": "caf", "completion": "\u00e9 au lait"}))
    assert learned(prepared) == ["\u00e9 au lait<|endoftext|>"]


def test_media_belong_to_the_prompt() -> None:
    row = {"prompt": "a", "completion": "<image>b", "images": ["a.png"]}
    assert "the completion has an <image> or <video> tag" in error_of(row)


def test_media_of_other_columns_have_no_place_in_an_interleaved_document() -> None:
    row = {"texts": ["a", None], "images": [None, "a.png"], "videos": ["a.mp4"]}
    assert "the column videos has no place beside a list of texts" in error_of(row)
    assert parse({**row, "videos": []}).parts[0] == "a"
    assert "images is 5; it must be a list" in error_of({**row, "videos": [], "images": 5})


def test_placeholders_of_other_models_are_not_taught() -> None:
    assert "the placeholder <image_placeholder>" in error_of(
        {"text": "<image_placeholder>", "image": "a.png"}
    )
    assert parse({"text": "<image_placeholder>"}).parts == ("<image_placeholder>",)
