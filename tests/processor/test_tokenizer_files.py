"""The byte tokenizer's folder: its ids, its merges, and that transformers reads it alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import CheckpointError
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tokenizer_files import (
    SPECIAL_TOKENS,
    complete_tokenizer,
    to_bytes,
    write_byte_tokenizer,
)
from tests.tiny import CHARACTERS, tiny_tokenizer, tiny_tokenizer_dir


def test_bytes_come_first_then_characters_then_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert sorted(tokenizer.bytes_of(i) for i in range(256)) == [bytes([b]) for b in range(256)]
    # five characters of two bytes or fewer need one merge, the others two, less shared starts
    first_special = tokenizer.id_of(SPECIAL_TOKENS[0])
    assert [tokenizer.id_of(t) - first_special for t in SPECIAL_TOKENS] == list(range(14))
    assert len(tokenizer) == first_special + 14


def test_each_character_is_one_token() -> None:
    for char in CHARACTERS:
        assert len(tiny_tokenizer().encode_text(char)) == 1


@given(st.text())
def test_text_is_spelt_out_character_by_character(text: str) -> None:
    tokenizer = tiny_tokenizer()
    for token in tokenizer.encode_text(text, special="none"):
        spelled = tokenizer.bytes_of(token)
        assert len(spelled) == 1 or spelled[0] >= 0xC0, (
            "a merge begins with the head of a character"
        )
        assert len(spelled.decode(errors="replace")) == 1


def test_characters_are_taken_as_text_is_normalized(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, ["e\u0301", "\u212b"])  # both have a composed form
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode_text("e\u0301")) == len(tokenizer.encode_text("\u00c5")) == 1


def test_nothing_but_ascii_needs_no_merges(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "abc")
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\n"
    assert len(Tokenizer.from_folder(tmp_path)) == 256 + 14


def test_both_forms_of_the_folder_agree(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tiny_tokenizer_dir() / name).read_bytes())
    text = "na\u00efve \u4f60\u597d\uff01 <|box_start|> \U0001f98a"
    both = [Tokenizer.from_folder(f) for f in (tmp_path, tiny_tokenizer_dir())]
    assert both[0].encode_text(text) == both[1].encode_text(text)
    assert both[0].special_ids == both[1].special_ids


def test_added_tokens_spelt_in_their_own_characters_are_taken_as_they_are() -> None:
    assert to_bytes("\u0120a") == b" a"
    assert to_bytes("<|im_end|>") == b"<|im_end|>"
    assert to_bytes("<\u4f60>") == "<\u4f60>".encode()


def test_the_pad_and_end_tokens_are_named_for_other_programs() -> None:
    settings = json.loads((tiny_tokenizer_dir() / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|endoftext|>"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["bos_token"] is None
    named = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
    assert named == {i: t for t, i in tiny_tokenizer().special_ids.items()}


@pytest.fixture(scope="module")
def theirs() -> object:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_dir())


@pytest.mark.parametrize(
    "text",
    [
        "Hello world, it's 2024!",
        "  two\n\n \nlines\t",
        "na\u00efve e\u0301 \u4f60\u597d\uff01 \u273fFUNCTION\u273f: \U0001f98a",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n",
        "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>",
    ],
)
def test_transformers_gives_the_same_ids(theirs: object, text: str) -> None:
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    ids = tiny_tokenizer().encode_text(text, special="all")
    assert theirs(text).input_ids == ids  # pyright: ignore[reportCallIssue] - untyped oracle
    assert len(theirs) == len(tiny_tokenizer())  # pyright: ignore[reportArgumentType] - same


def test_a_tokenizer_that_has_all_special_tokens_stays_as_it_is(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "")
    (tmp_path / "copy").mkdir()
    assert complete_tokenizer(tmp_path, tmp_path / "copy") == []
    one, two = (Tokenizer.from_folder(p) for p in (tmp_path, tmp_path / "copy"))
    assert one.special_ids == two.special_ids
    assert (tmp_path / "copy" / "vocab.json").is_file()


def test_a_tokenizer_to_complete_must_be_there_and_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        complete_tokenizer(tmp_path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read: "):
        complete_tokenizer(tmp_path, tmp_path)
