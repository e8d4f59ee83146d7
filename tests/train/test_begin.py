"""A run begins from a folder or from nothing, never from both."""

from pathlib import Path

import pytest
import torch

from qwen2vl.errors import ConfigError
from qwen2vl.recipes import nano, tiny
from qwen2vl.train.begin import begin
from qwen2vl.train.config import override


def test_a_fresh_model_takes_its_special_ids_from_its_tokenizer(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"out={tmp_path}"])
    model, processor, folder = begin(config)
    assert folder == tmp_path / "tokenizer"
    assert (folder / "tokenizer.json").is_file()
    assert model.config.image_token_id == processor.tokenizer.id_of("<|image_pad|>")
    assert len(processor.tokenizer) <= model.config.text.vocab_size


def test_fresh_weights_are_seeded(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"out={tmp_path}"])
    one, two = begin(config)[0], begin(config)[0]
    other = begin(override(config, ["seed=1"]))[0]
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


@pytest.mark.parametrize("words", [["init=somewhere"], []])
def test_folder_and_fresh_model_exclude_each_other(words: list[str]) -> None:
    config = override(tiny.recipe(), words)
    if not words:
        config = type(config)(name="x", stages=config.stages)
    with pytest.raises(ConfigError, match="either from a folder"):
        begin(config)


def test_nano_keeps_to_its_promised_size() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        from qwen2vl.model import Qwen2VL

        parameters = sum(p.numel() for p in Qwen2VL(nano.MODEL).parameters())
    assert 3e6 <= parameters <= 6e6
