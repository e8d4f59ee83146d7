"""Model initialization of a run: from a folder, or at random."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen2vl.errors import CheckpointError, ConfigError
from qwen2vl.recipes import nano, tiny
from qwen2vl.train.config import TrainConfig, override
from qwen2vl.train.init import build_model
from tests.folders import write_tiny


def test_a_new_model_takes_its_special_token_ids_from_its_tokenizer(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"output_dir={tmp_path}"])
    model, processor, folder = build_model(config)
    assert folder == tmp_path / "tokenizer"
    assert (folder / "tokenizer.json").is_file()
    assert model.config.image_token_id == processor.tokenizer.token_to_id("<|image_pad|>")
    assert len(processor.tokenizer) <= model.config.text.vocab_size


def test_merges_are_learned_from_the_questions_of_the_last_stage(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"output_dir={tmp_path}", "num_merges=300"])
    text = replace(tiny.recipe().model.text, vocab_size=1024)  # type: ignore[union-attr]
    config = replace(config, model=replace(config.model, text=text))  # type: ignore[type-var]
    _, processor, _ = build_model(config)
    tokenizer = processor.tokenizer
    question = "What color is the circle?"
    assert len(tokenizer.encode_text(question)) <= 8
    assert tokenizer.decode(tokenizer.encode_text(question)) == question
    assert len(tokenizer.encode_text("äЖω")) == 3  # letters of Europe are one token each
    assert len(tokenizer.encode_text("x7Qk")) == 4  # random strings are characters


def test_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"output_dir={tmp_path}", "num_merges=300"])
    with pytest.raises(
        ConfigError, match=r"run tiny: the tokenizer has .* tokens and the model 288"
    ):
        build_model(config)


def test_an_existing_tokenizer_is_not_rewritten(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"output_dir={tmp_path}"])
    (tmp_path / ".tokenizer.partial").mkdir()  # of a run that was killed
    _, _, folder = build_model(config)
    mtimes = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build_model(config)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == mtimes
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_random_weights_are_seeded(tmp_path: Path) -> None:
    config = override(tiny.recipe(), [f"output_dir={tmp_path}"])
    first, second = build_model(config)[0], build_model(config)[0]
    other = build_model(override(config, ["seed=1"]))[0]
    for (name, a), b, c in zip(
        first.named_parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_init_takes_precedence_over_the_recipe_s_model(tmp_path: Path) -> None:
    written = write_tiny(tmp_path / "tiny")
    model, processor, folder = build_model(override(tiny.recipe(), [f"init={tmp_path / 'tiny'}"]))
    assert folder == tmp_path / "tiny"
    assert model.config == processor.config == written.config
    for (name, a), b in zip(model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.*no such folder"):
        build_model(override(tiny.recipe(), ["init=./nowhere"]))


def test_a_run_without_init_and_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="run x: no model to start from; give init=FOLDER"):
        build_model(TrainConfig(name="x", stages=tiny.recipe().stages))


def test_nano_has_8_to_12_million_parameters() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        from qwen2vl.model import Qwen2VL

        parameters = sum(p.numel() for p in Qwen2VL(nano.MODEL).parameters())
    assert 8e6 <= parameters <= 12e6
