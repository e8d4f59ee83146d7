"""Tokenizer: published ids, special tokens in text, decoding, streaming, and folders."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unicodedata import normalize

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.config import PRESETS, Qwen2VLConfig
from qwen2vl.errors import CheckpointError, InputError
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.tokenizer import AllowedSpecial, IncrementalDetokenizer, Tokenizer
from qwen2vl.processor.tokenizer_files import IM_END, IM_START, SPECIAL_TOKENS
from tests.tiny import tiny_config, tiny_tokenizer, tiny_tokenizer_dir


@pytest.fixture(scope="module")
def official(official_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(official_tokenizer_dir)


# Text that is hard to tokenize: symbols, line breaks, whole and partial special tokens.
pieces = st.sampled_from(
    [*SPECIAL_TOKENS, "<|", "|>", "<|im_", "end|>", "\n", "\n\n", " ", "  ", "it's", "IT'S", "2024"]
    + ["e\u0301", "\u4f60\u597d", "\uff01", "\u273f", "\U0001f98a", "\u200b", "\r\n", "\x00"]
)
texts = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


# Ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9707, 1879]),
        (" Hello world", [21927, 1879]),
        ("Picture 1: ", [24669, 220, 16, 25, 220]),
        ("Video 1: ", [10724, 220, 16, 25, 220]),
        (
            "<|box_start|>(176,106),(232,160)<|box_end|>",
            [151648, 7, 16, 22, 21, 11, 16, 15, 21, 23547, 17, 18, 17, 11, 16, 21, 15, 8, 151649],
        ),
        (
            "2024\u5e749\u670818\u65e5\uff0c\u4f60\u597d\uff01",
            [17, 15, 17, 19, 7948, 24, 9754, 16, 23, 8903, 3837, 108386, 6313],
        ),
        ("e\u0301 caf\u00e9", [963, 51950]),  # NFC
        ("\u273fFUNCTION\u273f: Tap", [144575, 18149, 144575, 25, 36134]),
    ],
)
def test_published_token_ids(official: Tokenizer, text: str, ids: list[int]) -> None:
    assert official.encode_text(text) == ids


def test_special_ids_of_the_official_folder(official: Tokenizer) -> None:
    assert official.special_ids == {t: 151643 + i for i, t in enumerate(SPECIAL_TOKENS)}
    assert len(official) == 151657


@given(texts)
def test_all_special_tokens_allowed_equals_the_tokenizers_library(text: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_tokenizer_dir() / "tokenizer.json"))
    ids = tiny_tokenizer().encode_text(text, allowed_special="all")
    assert ids == backend.encode(text, add_special_tokens=False).ids


@given(texts)
def test_user_text_cannot_forge_chat_structure(text: str) -> None:
    tokenizer = tiny_tokenizer()
    grounding = {tokenizer.token_to_id(token) for token in GROUNDING_TOKENS}
    special = set(tokenizer.special_ids.values())
    assert not special & set(tokenizer.encode_text(text, allowed_special="none"))
    assert special & set(tokenizer.encode_text(text)) <= grounding


@given(texts)
def test_encode_decode_round_trip(text: str) -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.decode(
        tokenizer.encode_text(text, allowed_special="none"), keep_special="all"
    )
    assert plain == normalize("NFC", text)
    parts = [normalize("NFC", part) for part in tokenizer.split_special_tokens(text)]
    assert tokenizer.decode(
        tokenizer.encode_text(text, allowed_special="all"), keep_special="all"
    ) == "".join(parts)


@given(texts.map(partial(normalize, "NFC")), st.sampled_from(["none", "markup", "all"]))
def test_offsets_cover_the_text(text: str, special: AllowedSpecial) -> None:
    tokenizer = tiny_tokenizer()
    spans = tokenizer.encode_with_offsets(text, allowed_special=special)
    assert [token for token, _, _ in spans] == tokenizer.encode_text(text, allowed_special=special)
    covered = {i for _, start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_returned_ids_may_be_modified() -> None:
    tokenizer = tiny_tokenizer()
    first = tokenizer.encode_text("the same text")
    first.append(-1)
    assert tokenizer.encode_text("the same text") == first[:-1]


def test_encode_cache_is_bounded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_tokenizer_dir())
    for i in range(5000):
        tokenizer.encode_text(str(i))
    tokenizer.encode_text("x" * 10_000)
    assert len(tokenizer._encode_cache) <= 4096
    assert max(map(len, tokenizer._encode_cache)) <= 256


def test_half_a_surrogate_pair_is_rejected() -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tiny_tokenizer().encode_text("a\ud800b")


def test_tokenizer_can_be_pickled_for_worker_processes() -> None:
    tokenizer = pickle.loads(pickle.dumps(tiny_tokenizer()))
    assert tokenizer.encode_text("a<|box_start|>") == tiny_tokenizer().encode_text("a<|box_start|>")


# Decoding -------------------------------------------------------------------------------------


def test_decoding_keeps_grounding_tokens_and_drops_the_rest(official: Tokenizer) -> None:
    text = "<|im_start|>a<|box_start|>(1,2)<|box_end|><|im_end|>"
    ids = official.encode_text(text, allowed_special="all")
    assert official.decode(ids) == "a<|box_start|>(1,2)<|box_end|>"
    assert official.decode(ids, keep_special="none") == "a(1,2)"
    assert official.decode(ids, keep_special="all") == text


def test_unused_ids_of_the_vocabulary_decode_to_nothing(official: Tokenizer) -> None:
    assert official.decode([9707, 151657, 151935, 1879]) == "Hello world"


any_ids = st.lists(st.integers(0, len(tiny_tokenizer()) - 1), max_size=30)


@given(any_ids)
def test_decoding_equals_the_tokenizers_library(ids: list[int]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_tokenizer_dir() / "tokenizer.json"))
    assert tiny_tokenizer().decode(ids, keep_special="all") == backend.decode(
        ids, skip_special_tokens=False
    )
    assert tiny_tokenizer().decode(ids, keep_special="none") == backend.decode(ids)


@given(any_ids)
def test_incremental_detokenizer_equals_decode(ids: list[int]) -> None:
    stream = IncrementalDetokenizer(tiny_tokenizer())
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    assert text == tiny_tokenizer().decode(ids)


def test_incremental_detokenizer_returns_whole_characters() -> None:
    tokenizer = tiny_tokenizer()
    stream = IncrementalDetokenizer(tokenizer)
    ids = tokenizer.encode_text("a\U0001f98ab")
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "\U0001f98a", "b"]
    assert stream.finish() == ""


def test_incremental_detokenizer_marks_an_incomplete_last_character() -> None:
    tokenizer = tiny_tokenizer()
    stream = IncrementalDetokenizer(tokenizer)
    for i in tokenizer.encode_text("\U0001f98a")[:2]:
        assert stream.push(i) == ""
    assert stream.finish() == "\ufffd"


# Folders --------------------------------------------------------------------------------------


def test_vocab_and_merges_without_tokenizer_json(official: Tokenizer, tmp_path: Path) -> None:
    source = Path(official.name)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    text = "It's 2024: na\u00efve caf\u00e9s \u4f60\u597d\n\n  <|box_start|>(1,2)"
    assert tokenizer.special_ids == official.special_ids
    assert tokenizer.encode_text(text) == official.encode_text(text)


def test_folder_without_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, and no vocab\.json with"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Magic"}}'])
def test_damaged_tokenizer_file_is_rejected(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: the tokenizer cannot be read"):
        Tokenizer.from_folder(tmp_path)


def edited(tmp_path: Path, **changes: object) -> Path:
    """Write the tiny tokenizer with changed top-level entries."""
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | changes))
    return tmp_path


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    others = [token for token in raw["added_tokens"] if token["content"] != IM_START]
    with pytest.raises(CheckpointError, match=r"special tokens missing: <\|im_start\|>;"):
        Tokenizer.from_folder(edited(tmp_path, added_tokens=others))


def test_truncation_and_padding_of_the_file_are_disabled(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = Tokenizer.from_folder(edited(tmp_path, truncation=truncation, padding=padding))
    assert tokenizer.decode(tokenizer.encode_text("longer than four")) == "longer than four"


def test_tokenizer_fits_its_config(official: Tokenizer) -> None:
    tiny_tokenizer().check_config(tiny_config())
    for config in PRESETS.values():
        official.check_config(config)


def test_eos_of_base_models_is_endoftext(official: Tokenizer) -> None:
    official.check_config(replace(PRESETS["2B"], eos_token_id=151643))


def with_swapped_placeholders(config: Qwen2VLConfig) -> Qwen2VLConfig:
    return replace(
        config, image_token_id=config.video_token_id, video_token_id=config.image_token_id
    )


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (
            with_swapped_placeholders(tiny_config()),
            r"<\|image_pad\|> is \d+, config\.json wants \d+; <\|video_",
        ),
        (replace(tiny_config(), eos_token_id=7), r"<\|im_end\|> is \d+, config\.json wants 7"),
        (PRESETS["2B"], r"<\|endoftext\|> is \d+, config\.json wants 151643; <\|im_start\|>"),
    ],
)
def test_tokenizer_of_another_model_is_rejected_with_the_ids(
    config: Qwen2VLConfig, error: str
) -> None:
    with pytest.raises(CheckpointError, match=error):
        tiny_tokenizer().check_config(config)


def test_swapped_tokens_without_an_id_in_config_are_detected(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    by_name = {token["content"]: token for token in raw["added_tokens"]}
    first, second = by_name["<|box_start|>"], by_name["<|box_end|>"]
    first["content"], second["content"] = second["content"], first["content"]
    tokenizer = Tokenizer.from_folder(edited(tmp_path, added_tokens=raw["added_tokens"]))
    with pytest.raises(CheckpointError, match=r"<\|box_start\|> is \d+, .*<\|box_end\|> is \d+"):
        tokenizer.check_config(tiny_config())


def test_vocabulary_larger_than_the_embedding_is_rejected(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    extra = {**raw["added_tokens"][-1], "content": "<|new|>", "id": len(tiny_tokenizer())}
    tokenizer = Tokenizer.from_folder(edited(tmp_path, added_tokens=[*raw["added_tokens"], extra]))
    assert tokenizer.token_to_id(IM_END) == tiny_tokenizer().token_to_id(IM_END)
    with pytest.raises(
        CheckpointError, match=r"\(the last is <\|new\|>\), config\.json has vocab_size \d+; after"
    ):
        tokenizer.check_config(tiny_config())


@pytest.mark.parametrize("text", ["hello world " * 1000, "a" * 9000, "\u4f60e\u0301 \n" * 3000])
def test_long_text_has_the_ids_of_the_backend(official: Tokenizer, text: str) -> None:
    encoding = official._backend.encode(text, add_special_tokens=False)
    assert official.encode_text(text) == encoding.ids
    spans = [
        (i, start, end) for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
    assert official.encode_with_offsets(text) == spans


def test_half_a_surrogate_in_long_text_is_refused(official: Tokenizer) -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        official.encode_text("a" * 10_000 + "\ud800")
