"""Tokenizer folders: ids and merges of byte tokenizers, and equality with transformers."""

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
    add_missing_special_tokens,
    to_bytes,
    write_bpe_tokenizer,
    write_byte_tokenizer,
)
from tests.tiny import CHARACTERS, tiny_tokenizer, tiny_tokenizer_dir


def test_id_order_is_bytes_characters_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert sorted(tokenizer.id_to_bytes(i) for i in range(256)) == [bytes([b]) for b in range(256)]
    # Characters of two bytes need one merge, longer ones two or three, minus shared prefixes.
    first_special = tokenizer.token_to_id(SPECIAL_TOKENS[0])
    assert [tokenizer.token_to_id(t) - first_special for t in SPECIAL_TOKENS] == list(range(14))
    assert len(tokenizer) == first_special + 14


def test_each_character_is_one_token() -> None:
    for char in CHARACTERS:
        assert len(tiny_tokenizer().encode_text(char)) == 1


@given(st.text())
def test_text_is_tokenized_character_by_character(text: str) -> None:
    tokenizer = tiny_tokenizer()
    for token in tokenizer.encode_text(text, allowed_special="none"):
        spelled = tokenizer.id_to_bytes(token)
        assert len(spelled) == 1 or spelled[0] >= 0xC0, (
            "a merged token begins with the first byte of a character"
        )
        assert len(spelled.decode(errors="replace")) == 1


def test_characters_are_normalized_like_text(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, ["e\u0301", "\u212b"])  # both have a composed form
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode_text("e\u0301")) == len(tokenizer.encode_text("\u00c5")) == 1


def test_ascii_needs_no_merges(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "abc")
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\n"
    assert len(Tokenizer.from_folder(tmp_path)) == 256 + 14


def test_vocab_and_merges_equal_tokenizer_json(tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tiny_tokenizer_dir() / name).read_bytes())
    text = "na\u00efve \u4f60\u597d\uff01 <|box_start|> \U0001f98a"
    both = [Tokenizer.from_folder(f) for f in (tmp_path, tiny_tokenizer_dir())]
    assert both[0].encode_text(text) == both[1].encode_text(text)
    assert both[0].special_ids == both[1].special_ids


def test_merges_are_learned_from_texts(tmp_path: Path) -> None:
    texts = ["where is the red circle", "where is the blue circle"] * 50
    marked = [f"{SPECIAL_TOKENS[3]}circle{SPECIAL_TOKENS[4]}"] * 50  # marks are no text
    write_bpe_tokenizer(tmp_path, texts + marked, num_merges=80, characters="äЖ")
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in ("where is the red circle", "äЖ where", "xyz 😀", "circlecircle"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert len(tokenizer.encode_text("where is the circle")) == 4
    assert len(tokenizer.encode_text("äЖ")) == 2
    assert len(tokenizer.encode_text(SPECIAL_TOKENS[3])) == 1
    assert 256 + 2 + 14 < len(tokenizer) <= 256 + 2 + 80 + 14


def test_learned_merges_are_the_same_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_bpe_tokenizer(tmp_path, ["what color is the circle"] * 9, num_merges=40, characters="é")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in ("what color", "The circlé is what?", "<|im_start|>user\nwhat<|im_end|>"):
        assert reference(text)["input_ids"] == tokenizer.encode_text(text, allowed_special="all")


def test_added_tokens_outside_the_byte_map_are_encoded_as_utf8() -> None:
    assert to_bytes("\u0120a") == b" a"
    assert to_bytes("<|im_end|>") == b"<|im_end|>"
    assert to_bytes("<\u4f60>") == "<\u4f60>".encode()


def test_tokenizer_config_has_pad_and_eos_tokens() -> None:
    settings = json.loads((tiny_tokenizer_dir() / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|endoftext|>"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["bos_token"] is None
    named = {int(i): token["content"] for i, token in settings["added_tokens_decoder"].items()}
    assert named == {i: t for t, i in tiny_tokenizer().special_ids.items()}


@pytest.fixture(scope="module")
def hf_tokenizer() -> object:
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
def test_transformers_gives_the_same_ids(hf_tokenizer: object, text: str) -> None:
    assert type(hf_tokenizer).__name__.startswith("Qwen2Tokenizer")
    ids = tiny_tokenizer().encode_text(text, allowed_special="all")
    assert hf_tokenizer(text).input_ids == ids  # pyright: ignore[reportCallIssue] - untyped oracle
    assert len(hf_tokenizer) == len(tiny_tokenizer())  # pyright: ignore[reportArgumentType] - same


def test_complete_tokenizer_is_copied_unchanged(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, "")
    (tmp_path / "copy").mkdir()
    assert add_missing_special_tokens(tmp_path, tmp_path / "copy") == []
    one, two = (Tokenizer.from_folder(p) for p in (tmp_path, tmp_path / "copy"))
    assert one.special_ids == two.special_ids
    assert (tmp_path / "copy" / "vocab.json").is_file()


def test_missing_or_damaged_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        add_missing_special_tokens(tmp_path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read: "):
        add_missing_special_tokens(tmp_path, tmp_path)
