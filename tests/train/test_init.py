"""A run begins from a folder, or from fresh weights."""

from pathlib import Path

import pytest
import torch

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.recipes import nano, tiny
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.init import begin
from tests.folders import write_tiny


def test_a_fresh_model_takes_its_special_ids_from_its_tokenizer(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"out={tmp_path}"])
    model, processor, folder = begin(config)
    assert folder == tmp_path / "tokenizer"
    assert (folder / "tokenizer.json").is_file()
    assert model.config.image_token_id == processor.tokenizer.id_of("<|image_pad|>")
    assert len(processor.tokenizer) <= model.config.text.vocab_size


def test_a_tokenizer_that_is_there_is_left_to_its_readers(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"out={tmp_path}"])
    (tmp_path / ".tokenizer.partial").mkdir()  # of a run that was killed
    _, _, folder = begin(config)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    begin(config)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_fresh_weights_are_seeded(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"out={tmp_path}"])
    one, two = begin(config)[0], begin(config)[0]
    other = begin(override(config, ["seed=1"]))[0]
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_a_folder_comes_before_the_recipe_s_fresh_model(tmp_path: Path) -> None:
    written = write_tiny(tmp_path / "tiny")
    model, processor, folder = begin(override(tiny.recipe(), [f"init={tmp_path / 'tiny'}"]))
    assert folder == tmp_path / "tiny"
    assert model.config == processor.config == written.config
    for (name, a), b in zip(model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*no such folder"):
        begin(override(tiny.recipe(), ["init=./nowhere"]))


def test_a_run_needs_something_to_begin_from() -> None:
    with pytest.raises(ConfigError, match="run x: nothing to begin from; give init=FOLDER"):
        begin(TrainConfig(name="x", stages=tiny.recipe().stages))


def test_nano_keeps_to_its_promised_size() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        from qwen2vl.model import Qwen2VL

        parameters = sum(p.numel() for p in Qwen2VL(nano.MODEL).parameters())
    assert 3e6 <= parameters <= 6e6
