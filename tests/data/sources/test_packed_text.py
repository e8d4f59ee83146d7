"""The token store: what goes in comes out, cut where it must be, and damage is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.data.dataset import Corpus
from qwen2vl.data.preprocess import Preparer
from qwen2vl.data.sources.packed_text import TokenStore, pack_text
from qwen2vl.errors import InputError
from tests.tiny import tiny_processor, tiny_tokenizer

DOCUMENTS = ["one", "", "two <|im_end|> three", "x" * 150]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    packed = pack_text(DOCUMENTS, tiny_tokenizer(), tmp_path / "store")
    assert packed.documents == 3  # an empty one is none
    return tmp_path / "store"


def test_every_document_comes_back_and_long_ones_in_pieces(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), longest=64)
    whole = [store.read(i).ids.tolist() for i in range(len(store))]
    assert [len(ids) for ids in whole] == store.lengths().tolist()
    assert max(map(len, whole)) == 64
    joined = [token for ids in whole for token in ids]
    text = tiny_tokenizer().decode(joined, keep="all")
    assert text == "".join(f"{d}<|endoftext|>" for d in DOCUMENTS if d)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(2).ids, store.read(2).ids)


def test_special_tokens_in_text_are_plain_characters(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), longest=512)
    assert tiny_tokenizer().id_of("<|im_end|>") not in store.read(1).ids


def test_all_of_a_piece_is_learned_but_its_first_token(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), longest=64)
    made = Preparer(tiny_processor(), DataConfig(sources=(Source(path="x"),))).prepare(
        store.read(0)
    )
    assert made.loss_mask == [True] * len(made.input_ids)
    assert made.position_ids_3T.tolist() == [list(range(len(made.input_ids)))] * 3


def test_a_store_is_a_source_like_any(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(
        sources=(Source(path=str(folder)),), max_tokens=64, bins=1, cache=str(tmp_path / "c")
    )
    corpus = Corpus.open(data, tiny_processor(), seed=0)
    examples, bad = corpus.read(range(len(corpus.tokens)))
    assert not bad
    assert {e.family for e in examples} == {"store"}
    assert corpus.targets.sum() == corpus.tokens.sum() - len(corpus.tokens)


def test_damage_and_strangers_are_refused(folder: Path) -> None:
    tokens = folder / "tokens.bin"
    raw = tokens.read_bytes()
    tokens.write_bytes(raw[:-2])
    with pytest.raises(InputError, match=r"tokens.bin holds [\d,]+ tokens, store.json says"):
        TokenStore(folder, tiny_tokenizer(), longest=64)
    tokens.write_bytes(raw)
    about = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**about, "tokenizer": "another"}))
    with pytest.raises(InputError, match="packed with another tokenizer than this model's"):
        TokenStore(folder, tiny_tokenizer(), longest=64)
    (folder / "store.json").write_text("{")
    with pytest.raises(InputError, match="is a damaged token store; pack the text again"):
        TokenStore(folder, tiny_tokenizer(), longest=64)


def test_nothing_to_pack_and_a_folder_in_the_way_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no text to pack"):
        pack_text([""], tiny_tokenizer(), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    with pytest.raises(InputError, match="store exists; name a new folder"):
        pack_text(["x"], tiny_tokenizer(), folder)
