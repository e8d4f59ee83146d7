"""Fine-tunes with added tokens and resized embeddings: transformers and this library agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers import Qwen2VLForConditionalGeneration as ReferenceModel

from qwen2vl.engine import LLM
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.weights import read_generation_defaults, save_folder
from tests.adapters import write_adapter
from tests.folders import edit_json, write_tiny
from tests.parity.reference import compute_logits, compute_reference_logits, random_model
from tests.prompts import Prompt
from tests.tiny import tiny_config, tiny_tokenizer

SPECIAL = ["<|polygon_start|>", "<|polygon_end|>"]
TEXTS = (
    "a<|polygon_start|>(1,2)<|polygon_end|> b<seg>c",
    "<|im_start|>user\n<seg> <seg><|im_end|><|polygon_end|>",
    "\u00fc<|polygon_start|\u4f60>",
)


def add_tokens(source: Path, target: Path) -> AutoTokenizer:
    """Add special and other tokens to the tokenizer of a folder, as fine-tunes do."""
    reference = AutoTokenizer.from_pretrained(source)
    tokens = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    reference.add_tokens(tokens, special_tokens=True)
    reference.add_tokens(["<seg>"])
    reference.save_pretrained(target)
    return reference


def finetune(path: Path, *, tied: bool, multiple: int | None = None) -> ReferenceModel:
    """Write a random model of transformers with added tokens and a resized embedding."""
    write_tiny(path, model=random_model(tiny_config(tie_word_embeddings=tied)))
    add_tokens(path, path)
    reference = ReferenceModel.from_pretrained(path)
    torch.manual_seed(0)
    reference.resize_token_embeddings(
        len(tiny_tokenizer()) + 3, pad_to_multiple_of=multiple, mean_resizing=False
    )
    reference.save_pretrained(path)
    return reference.eval()


def assert_tokenizers_agree(folder: Path) -> None:
    reference, tokenizer = AutoTokenizer.from_pretrained(folder), Tokenizer.from_folder(folder)
    assert len(tokenizer) == len(reference)
    for text in TEXTS:
        ids = reference(text)["input_ids"]
        assert tokenizer.encode_text(text, allowed_special="all") == ids
        for keep, skip in (("all", False), ("none", True)):
            decoded = reference.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, keep_special=keep) == decoded  # type: ignore[arg-type]


def test_the_official_tokenizer_with_added_tokens(
    official_tokenizer_dir: Path, tmp_path: Path
) -> None:
    add_tokens(official_tokenizer_dir, tmp_path / "saved")
    assert_tokenizers_agree(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").token_to_id(SPECIAL[0]) == 151_657


def assert_logits_equal(model: Qwen2VL, reference: ReferenceModel, ids: list[int]) -> None:
    prompt, no_patches = Prompt(ids=ids, visuals=[]), torch.empty(0, 1176)
    with torch.no_grad():
        expected = compute_reference_logits(reference, prompt, no_patches, model.config)
        torch.testing.assert_close(compute_logits(model, prompt, no_patches), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multiple", [None, 64, 128])
def test_resized_embeddings_give_the_same_logits(
    tmp_path: Path, tied: bool, multiple: int | None
) -> None:
    folder = tmp_path / "finetune"
    reference = finetune(folder, tied=tied, multiple=multiple)
    model, processor = load(folder, dtype="float32")
    num_rows = reference.get_input_embeddings().weight.shape[0]
    assert num_rows % (multiple or 1) == 0
    assert model.config.text.vocab_size == num_rows
    assert_tokenizers_agree(folder)
    ids = processor([{"role": "user", "content": TEXTS[0]}]).input_ids
    assert len(tiny_tokenizer()) in ids
    assert_logits_equal(model, reference, ids)


def test_a_saved_folder_keeps_its_tokens(tmp_path: Path) -> None:
    reference = finetune(tmp_path / "finetune", tied=False, multiple=64)
    model, processor = load(tmp_path / "finetune", dtype="float32")
    save_folder(
        tmp_path / "saved",
        config=model.config,
        state_dict=model.state_dict(),
        tokenizer_folder=tmp_path / "finetune",
        pixels=processor.pixels,
        generation=read_generation_defaults(tmp_path / "finetune"),
        dtype=torch.float32,
    )
    assert_tokenizers_agree(tmp_path / "saved")
    again, _ = load(tmp_path / "saved", dtype="float32")
    ids = processor.tokenizer.encode_text(TEXTS[0])
    assert_logits_equal(again, reference, ids)
    assert_logits_equal(again, ReferenceModel.from_pretrained(tmp_path / "saved").eval(), ids)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    add_tokens(tmp_path / "model", tmp_path / "model")
    with pytest.raises(
        CheckpointError, match=r"\(the last is <seg>\), config\.json has vocab_size"
    ):
        load(tmp_path / "model")


def test_an_adapter_that_was_trained_with_added_tokens_is_refused_without_them(
    tmp_path: Path,
) -> None:
    model = write_tiny(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", model)
    add_tokens(tmp_path / "model", adapter)
    for options in ({"adapter": adapter}, {"adapters": {"a": adapter}}):
        with pytest.raises(CheckpointError, match=r"trained with the added token '<\|polygon_st"):
            LLM(tmp_path / "model", **options)


def test_rows_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    finetune(tmp_path / "model", tied=True)
    path, size = tmp_path / "model" / "config.json", len(tiny_tokenizer()) + 64
    text_config = json.loads(path.read_text()).get("text_config", {})
    edit_json(path, vocab_size=size, text_config={**text_config, "vocab_size": size})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is \[\d+, 64\]"):
        load(tmp_path / "model")


def test_generated_special_tokens_are_kept_on_request(tmp_path: Path) -> None:
    finetune(tmp_path / "model", tied=False)
    llm = LLM(tmp_path / "model", dtype="float32")
    token = len(tiny_tokenizer())
    for skip, expected in ((True, ""), (False, SPECIAL[0] * 3)):
        params = SamplingParams(
            temperature=0, max_tokens=3, logit_bias={token: 100.0}, skip_special_tokens=skip
        )
        (answer,) = llm.chat([{"role": "user", "content": "x"}], params)
        assert answer.token_ids == (token,) * 3
        assert answer.text == expected
        deltas = llm.stream([{"role": "user", "content": "x"}], params)
        assert "".join(delta.text for delta in deltas) == expected
    llm.close()
