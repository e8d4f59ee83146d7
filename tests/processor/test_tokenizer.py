"""Text <-> ids: the published vectors, whose special tokens text may hold, and streaming."""

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
from qwen2vl.processor.tokenizer import Special, TextStream, Tokenizer
from qwen2vl.processor.tokenizer_files import IM_END, IM_START, SPECIAL_TOKENS
from tests.tiny import tiny_config, tiny_tokenizer, tiny_tokenizer_dir


@pytest.fixture(scope="module")
def official(official_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.from_folder(official_tokenizer_dir)


# Text with what makes tokenizers stumble: marks, breaks, special tokens whole and torn.
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
def test_published_vectors(official: Tokenizer, text: str, ids: list[int]) -> None:
    assert official.encode_text(text) == ids


def test_special_ids_of_the_official_folder(official: Tokenizer) -> None:
    assert official.special_ids == {t: 151643 + i for i, t in enumerate(SPECIAL_TOKENS)}
    assert len(official) == 151657


@given(texts)
def test_trusted_text_gives_the_ids_of_the_library(text: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_tokenizer_dir() / "tokenizer.json"))
    ours = tiny_tokenizer().encode_text(text, special="all")
    assert ours == backend.encode(text, add_special_tokens=False).ids


@given(texts)
def test_text_of_people_cannot_forge_structure(text: str) -> None:
    tokenizer = tiny_tokenizer()
    grounding = {tokenizer.id_of(token) for token in GROUNDING_TOKENS}
    special = set(tokenizer.special_ids.values())
    assert not special & set(tokenizer.encode_text(text, special="none"))
    assert special & set(tokenizer.encode_text(text)) <= grounding


@given(texts)
def test_nothing_is_lost_between_text_and_ids(text: str) -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.decode(tokenizer.encode_text(text, special="none"), keep="all")
    assert plain == normalize("NFC", text)
    parts = [normalize("NFC", part) for part in tokenizer.split_special(text)]
    assert tokenizer.decode(tokenizer.encode_text(text, special="all"), keep="all") == "".join(
        parts
    )


@given(texts.map(partial(normalize, "NFC")), st.sampled_from(["none", "grounding", "all"]))
def test_spans_tile_the_text(text: str, special: Special) -> None:
    tokenizer = tiny_tokenizer()
    spans = tokenizer.encode_spans(text, special=special)
    assert [token for token, _, _ in spans] == tokenizer.encode_text(text, special=special)
    covered = {i for _, start, end in spans for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_ids_handed_out_are_the_callers_own() -> None:
    tokenizer = tiny_tokenizer()
    first = tokenizer.encode_text("the same text")
    first.append(-1)
    assert tokenizer.encode_text("the same text") == first[:-1]


def test_memory_of_texts_is_bounded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_tokenizer_dir())
    for i in range(5000):
        tokenizer.encode_text(str(i))
    tokenizer.encode_text("x" * 10_000)
    assert len(tokenizer._encoded) <= 4096
    assert max(map(len, tokenizer._encoded)) <= 256


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="half of a surrogate pair"):
        tiny_tokenizer().encode_text("a\ud800b")


def test_a_tokenizer_goes_to_worker_processes() -> None:
    tokenizer = pickle.loads(pickle.dumps(tiny_tokenizer()))
    assert tokenizer.encode_text("a<|box_start|>") == tiny_tokenizer().encode_text("a<|box_start|>")


# Decoding -------------------------------------------------------------------------------------


def test_decoding_keeps_grounding_tokens_and_drops_the_rest(official: Tokenizer) -> None:
    text = "<|im_start|>a<|box_start|>(1,2)<|box_end|><|im_end|>"
    ids = official.encode_text(text, special="all")
    assert official.decode(ids) == "a<|box_start|>(1,2)<|box_end|>"
    assert official.decode(ids, keep="none") == "a(1,2)"
    assert official.decode(ids, keep="all") == text


def test_unused_rows_of_the_vocabulary_decode_to_nothing(official: Tokenizer) -> None:
    assert official.decode([9707, 151657, 151935, 1879]) == "Hello world"


any_ids = st.lists(st.integers(0, len(tiny_tokenizer()) - 1), max_size=30)


@given(any_ids)
def test_decoding_equals_the_library(ids: list[int]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tiny_tokenizer_dir() / "tokenizer.json"))
    assert tiny_tokenizer().decode(ids, keep="all") == backend.decode(
        ids, skip_special_tokens=False
    )
    assert tiny_tokenizer().decode(ids, keep="none") == backend.decode(ids)


@given(any_ids)
def test_a_stream_says_what_decoding_at_once_says(ids: list[int]) -> None:
    stream = TextStream(tiny_tokenizer())
    said = "".join(stream.push(i) for i in ids) + stream.finish()
    assert said == tiny_tokenizer().decode(ids)


def test_a_stream_never_says_half_a_character() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)
    ids = tokenizer.encode_text("a\U0001f98ab")
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "\U0001f98a", "b"]
    assert stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_says_so() -> None:
    tokenizer = tiny_tokenizer()
    stream = TextStream(tokenizer)
    for i in tokenizer.encode_text("\U0001f98a")[:2]:
        assert stream.push(i) == ""
    assert stream.finish() == "\ufffd"


# Folders --------------------------------------------------------------------------------------


def test_vocab_and_merges_serve_as_well(official: Tokenizer, tmp_path: Path) -> None:
    source = Path(official.name)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(source / name, tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    text = "It's 2024: na\u00efve caf\u00e9s \u4f60\u597d\n\n  <|box_start|>(1,2)"
    assert ours.special_ids == official.special_ids
    assert ours.encode_text(text) == official.encode_text(text)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, and no vocab\.json with"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Magic"}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: the tokenizer cannot be read"):
        Tokenizer.from_folder(tmp_path)


def edited(tmp_path: Path, **changes: object) -> Path:
    """Write the tiny tokenizer with other entries at the root of its file."""
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | changes))
    return tmp_path


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    kept = [token for token in raw["added_tokens"] if token["content"] != IM_START]
    with pytest.raises(CheckpointError, match=r"special tokens missing: <\|im_start\|>;"):
        Tokenizer.from_folder(edited(tmp_path, added_tokens=kept))


def test_truncation_and_padding_saved_in_a_file_are_switched_off(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tokenizer = Tokenizer.from_folder(edited(tmp_path, truncation=cut, padding=fill))
    assert tokenizer.decode(tokenizer.encode_text("longer than four")) == "longer than four"


def test_the_tokenizer_fits_its_config(official: Tokenizer) -> None:
    tiny_tokenizer().check(tiny_config())
    for config in PRESETS.values():
        official.check(config)


def test_a_base_model_may_end_with_endoftext(official: Tokenizer) -> None:
    official.check(replace(PRESETS["2B"], eos_token_id=151643))


def other_pads(config: Qwen2VLConfig) -> Qwen2VLConfig:
    return replace(
        config, image_token_id=config.video_token_id, video_token_id=config.image_token_id
    )


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (other_pads(tiny_config()), r"<\|image_pad\|> is \d+, config\.json wants \d+; <\|video_"),
        (replace(tiny_config(), eos_token_id=7), r"<\|im_end\|> is \d+, config\.json wants 7"),
        (PRESETS["2B"], r"<\|endoftext\|> is \d+, config\.json wants 151643; <\|im_start\|>"),
    ],
)
def test_another_models_tokenizer_is_refused_with_the_ids(
    config: Qwen2VLConfig, complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        tiny_tokenizer().check(config)


def test_exchanged_tokens_that_config_does_not_name_are_found(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    by_name = {token["content"]: token for token in raw["added_tokens"]}
    first, second = by_name["<|box_start|>"], by_name["<|box_end|>"]
    first["content"], second["content"] = second["content"], first["content"]
    tokenizer = Tokenizer.from_folder(edited(tmp_path, added_tokens=raw["added_tokens"]))
    with pytest.raises(CheckpointError, match=r"<\|box_start\|> is \d+, .*<\|box_end\|> is \d+"):
        tokenizer.check(tiny_config())


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    raw = json.loads((tiny_tokenizer_dir() / "tokenizer.json").read_text())
    extra = {**raw["added_tokens"][-1], "content": "<|new|>", "id": len(tiny_tokenizer())}
    tokenizer = Tokenizer.from_folder(edited(tmp_path, added_tokens=[*raw["added_tokens"], extra]))
    assert tokenizer.id_of(IM_END) == tiny_tokenizer().id_of(IM_END)
    with pytest.raises(CheckpointError, match=r"\d+ tokens, config\.json has \d+; take both"):
        tokenizer.check(tiny_config())
