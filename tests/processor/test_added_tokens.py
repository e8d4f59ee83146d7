"""Added tokens: where folders list them, their ids, and where they are recognized in text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken

from qwen2vl.errors import CheckpointError
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.folders import PIXELS, edit_json
from tests.tiny import tiny_config, tiny_tokenizer, tiny_tokenizer_dir

POLYGON = "<|polygon_start|>"
FIRST = len(tiny_tokenizer())  # the id of the first added token
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
ENTRY = {"content": POLYGON, **FLAGS, "special": True}


def folder_with(path: Path, *tokens: AddedToken, **config: Any) -> Path:
    """Copy the tiny tokenizer, with tokens added to tokenizer.json and keys to its config."""
    folder = path / "tokenizer"
    shutil.copytree(tiny_tokenizer_dir(), folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token in tokens:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    backend.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", **config)
    return folder


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, normalized=False, special=True, **flags)


# Where they are listed -------------------------------------------------------------------------


def list_in_tokenizer_json(folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([special(POLYGON)])
    backend.save(str(folder / "tokenizer.json"))


def list_in_decoder(folder: Path) -> None:
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={**decoder, str(FIRST): ENTRY})


def list_as_extra(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", extra_special_tokens=[POLYGON])


def list_in_special_tokens_map(folder: Path) -> None:
    content = json.dumps({"additional_special_tokens": [{**ENTRY}]})
    (folder / "special_tokens_map.json").write_text(content)


def list_in_added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({POLYGON: FIRST}))
    list_in_special_tokens_map(folder)


def list_without_tokenizer_json(folder: Path) -> None:
    list_in_decoder(folder)
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "add",
    [
        list_in_tokenizer_json,
        list_in_decoder,
        list_as_extra,
        list_in_special_tokens_map,
        list_in_added_tokens,
        list_without_tokenizer_json,
    ],
)
def test_special_tokens_are_recognized_wherever_a_folder_lists_them(
    tmp_path: Path, add: Any
) -> None:
    folder = folder_with(tmp_path)
    add(folder)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_to_id(POLYGON) == FIRST
    assert len(tokenizer) == FIRST + 1
    assert tokenizer.encode_text(f"a{POLYGON}b", allowed_special="all")[1] == FIRST


def test_a_token_that_one_file_calls_special_is_special(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, AddedToken(POLYGON, normalized=False))
    assert POLYGON not in Tokenizer.from_folder(folder).special_ids
    list_in_decoder(folder)
    assert Tokenizer.from_folder(folder).token_to_id(POLYGON) == FIRST


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_stated_ids_that_tokens_do_not_get_are_refused(tmp_path: Path, name: str) -> None:
    folder = folder_with(tmp_path)
    if name == "tokenizer.json":
        raw = json.loads((folder / name).read_text())
        raw["added_tokens"].append({**ENTRY, "id": FIRST + 5})
        (folder / name).write_text(json.dumps(raw))
    elif name == "tokenizer_config.json":
        edit_json(folder / name, added_tokens_decoder={str(FIRST + 5): ENTRY})
    else:
        (folder / name).write_text(json.dumps({POLYGON: FIRST + 5}))
    with pytest.raises(CheckpointError, match=rf"{name}: states id {FIRST + 5} for .*, but the"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("added_tokens.json", "[1]", "added_tokens.json: expected a JSON object"),
        ("added_tokens.json", '{"<x>": "first"}', "'first' is listed as the id"),
        ("special_tokens_map.json", "{", "special_tokens_map.json: cannot be read"),
        ("special_tokens_map.json", '{"pad_token": 3}', "'3' is listed as a token"),
    ],
)
def test_damaged_lists_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = folder_with(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(folder)


# In text ---------------------------------------------------------------------------------------


def test_added_markup_is_recognized_in_text_and_added_control_tokens_are_not(
    tmp_path: Path,
) -> None:
    tokens = [special(t) for t in (POLYGON, "<|end|>", "<|turn|>")]
    folder = folder_with(
        tmp_path, *tokens, pad_token="<|end|>", chat_template="{{ '<|turn|>' + content }}"
    )
    tokenizer = Tokenizer.from_folder(folder)
    text = f"a{POLYGON}<|end|><|turn|><|im_start|>"
    added = {i for i in tokenizer.encode_text(text) if i >= FIRST - 14}
    assert added == {FIRST}
    assert tokenizer.decode(tokenizer.encode_text(text), keep_special="all") == text
    trusted = tokenizer.encode_text(text, allowed_special="all")
    assert trusted[1:] == [FIRST, FIRST + 1, FIRST + 2, tokenizer.token_to_id("<|im_start|>")]
    assert not {*tokenizer.encode_text(text, allowed_special="none")} & {*range(FIRST, FIRST + 3)}


def test_messages_may_hold_added_markup(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, special(POLYGON)))
    config = tiny_config()
    resized = replace(config, text=replace(config.text, vocab_size=FIRST + 1))
    processor = Processor(resized, tokenizer, pixels=PIXELS)
    ids = processor([{"role": "user", "content": f"x{POLYGON}<|im_end|>"}]).input_ids
    assert ids.count(FIRST) == 1
    assert ids.count(tokenizer.token_to_id("<|im_end|>")) == 2  # of the system and the user turn


def test_tokens_that_are_not_special_are_matched_in_all_text_and_kept(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, AddedToken("<seg>", normalized=False), AddedToken("\u00e9\u00df\u00e9")
    )
    tokenizer = Tokenizer.from_folder(folder)
    text = "a<seg>\u00e9\u00df\u00e9 "
    ids = tokenizer.encode_text(text, allowed_special="none")
    assert [i for i in ids if i >= FIRST] == [FIRST, FIRST + 1]
    assert tokenizer.decode(ids, keep_special="none") == text


def test_the_longest_of_two_special_tokens_is_matched(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, special("[P]"), special("[P]s")))
    assert tokenizer.encode_text("[P]s[P]") == [FIRST + 1, FIRST]


def test_text_around_stripping_tokens_is_consumed_in_linear_time(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, special("[P]", lstrip=True)))
    assert tokenizer.encode_text("a \n [P]") == [*tokenizer.encode_text("a"), FIRST]
    spans = tokenizer.encode_with_offsets("a [P]")
    assert spans[-1] == (FIRST, 1, 5)
    assert tokenizer.split_special_tokens("a [P]b") == ["a", "[P]", "b"]
    assert FIRST not in tokenizer.encode_text(" " * 20_000 + "x")


def test_the_incremental_detokenizer_keeps_what_decode_keeps(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, special(POLYGON), AddedToken("<seg>")))
    text = f"{POLYGON}(1,2)<|box_start|>(3,4)<seg><|im_end|>"
    ids = tokenizer.encode_text(text, allowed_special="all")
    for keep, expected in (("all", text), ("grounding", "(1,2)<|box_start|>(3,4)<seg>")):
        stream = IncrementalDetokenizer(tokenizer, keep_special=keep)  # type: ignore[arg-type]
        assert "".join(stream.push(i) for i in ids) + stream.finish() == expected
        assert tokenizer.decode(ids, keep_special=keep) == expected  # type: ignore[arg-type]


# Adapters --------------------------------------------------------------------------------------


def test_an_adapter_with_tokens_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    adapter = folder_with(tmp_path, special(POLYGON))
    tokenizer = Tokenizer.from_folder(adapter)
    tokenizer.check_adapter(adapter)
    tokenizer.check_adapter(tmp_path)  # no tokenizer files
    with pytest.raises(CheckpointError, match=r"trained with the added token '<\|polygon_start"):
        tiny_tokenizer().check_adapter(adapter)
