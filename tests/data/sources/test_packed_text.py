"""Token store: packed documents are read back, long ones are split, damaged stores are refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.data.dataset import PackedDataset
from qwen2vl.data.preprocess import SamplePreprocessor
from qwen2vl.data.sources.packed_text import TokenStore, pack_text
from qwen2vl.errors import InputError
from tests.tiny import tiny_processor, tiny_tokenizer

DOCUMENTS = ["one", "", "two <|im_end|> three", "x" * 150]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    packed = pack_text(DOCUMENTS, tiny_tokenizer(), tmp_path / "store")
    assert packed.num_documents == 3  # an empty document is dropped
    return tmp_path / "store"


def test_all_documents_are_read_back_and_long_ones_are_split(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), max_tokens=64)
    samples = [store.read(i).ids.tolist() for i in range(len(store))]
    assert [len(ids) for ids in samples] == store.lengths().tolist()
    assert max(map(len, samples)) == 64
    joined = [token for ids in samples for token in ids]
    text = tiny_tokenizer().decode(joined, keep_special="all")
    assert text == "".join(f"{d}<|endoftext|>" for d in DOCUMENTS if d)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(2).ids, store.read(2).ids)


def test_special_tokens_in_text_are_encoded_as_plain_text(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), max_tokens=512)
    assert tiny_tokenizer().token_to_id("<|im_end|>") not in store.read(1).ids


def test_all_tokens_of_a_sample_are_supervised(folder: Path) -> None:
    store = TokenStore(folder, tiny_tokenizer(), max_tokens=64)
    processed = SamplePreprocessor(
        tiny_processor(), DataConfig(sources=(SourceConfig(path="x"),))
    ).prepare(store.read(0))
    assert processed.loss_mask == [True] * len(processed.input_ids)
    assert processed.position_ids_3T.tolist() == [list(range(len(processed.input_ids)))] * 3


def test_a_token_store_is_a_sample_source(folder: Path, tmp_path: Path) -> None:
    data = DataConfig(
        sources=(SourceConfig(path=str(folder)),),
        max_tokens=64,
        global_batch_size=1,
        cache_dir=str(tmp_path / "c"),
    )
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    examples, bad = dataset.read(range(len(dataset.tokens)))
    assert not bad
    assert {e.family for e in examples} == {"store"}
    assert dataset.targets.sum() == dataset.tokens.sum() - len(dataset.tokens)


def test_a_damaged_store_or_another_tokenizer_is_refused(folder: Path) -> None:
    tokens = folder / "tokens.bin"
    raw = tokens.read_bytes()
    tokens.write_bytes(raw[:-2])
    with pytest.raises(InputError, match=r"tokens.bin holds [\d,]+ tokens, store.json records"):
        TokenStore(folder, tiny_tokenizer(), max_tokens=64)
    tokens.write_bytes(raw)
    metadata = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**metadata, "tokenizer": "another"}))
    with pytest.raises(InputError, match="packed with another tokenizer than this model's"):
        TokenStore(folder, tiny_tokenizer(), max_tokens=64)
    (folder / "store.json").write_text("{")
    with pytest.raises(InputError, match="is a damaged token store; pack the text again"):
        TokenStore(folder, tiny_tokenizer(), max_tokens=64)


def test_no_text_and_an_existing_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no text to pack"):
        pack_text([""], tiny_tokenizer(), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    with pytest.raises(InputError, match="store exists; name a new folder"):
        pack_text(["x"], tiny_tokenizer(), folder)
