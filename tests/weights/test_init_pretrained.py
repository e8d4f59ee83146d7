"""A starting checkpoint out of two donors: what is kept, made, drawn and left out.

That every block computes what its donor computed is shown in tests/parity/test_transplant.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2vl.errors import CheckpointError
from qwen2vl.loading import load
from qwen2vl.processor.tokenizer_files import SPECIAL_TOKENS
from qwen2vl.weights import expected_shapes, read_config
from qwen2vl.weights.init_pretrained import transplant
from tests.donors import DEPTH, VOCABULARY, WIDTH, write_open_clip, write_text, write_tokenizer


@pytest.fixture
def donors(tmp_path: Path) -> tuple[Path, Path]:
    write_text(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    return tmp_path / "text", tmp_path / "vision"


def test_the_folder_is_a_whole_model(donors: tuple[Path, Path], tmp_path: Path) -> None:
    config = transplant(*donors, tmp_path / "out")
    assert (config.vision.depth, config.vision.embed_dim) == (DEPTH, WIDTH)
    assert config.vision.hidden_size == config.text.hidden_size == 64
    assert config.vision.temporal_patch_size == 2
    assert config.text.mrope_section == (2, 3, 3)
    assert config.text.max_position_embeddings == 32768  # the donor's 131072 was never trained
    assert config.text.rope_theta == 1e6
    assert read_config(tmp_path / "out") == config
    model, processor = load(tmp_path / "out", dtype="float32")
    assert processor.pixels.max_pixels == 12845056
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected_shapes(config)


def test_pixels_are_normalized_as_the_tower_was_used_to(
    donors: tuple[Path, Path], tmp_path: Path
) -> None:
    config = transplant(*donors, tmp_path / "out")
    assert config.vision.image_mean == (0.5, 0.4, 0.3)
    assert config.vision.image_std == (0.3, 0.2, 0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_is_the_donor_s_but_for_the_rows_of_new_tokens(
    tied: bool, donors: tuple[Path, Path], tmp_path: Path
) -> None:
    text = write_text(tmp_path / "again", tie_word_embeddings=tied)
    seen = write_tokenizer(tmp_path / "again")
    transplant(tmp_path / "again", donors[1], tmp_path / "out", dtype=torch.float32)
    made = load_file(tmp_path / "out" / "model.safetensors")
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & text.keys()
    for name, tensor in text.items():
        if name not in tables:
            assert torch.equal(made[name], tensor), name
    new = slice(seen, seen + len(SPECIAL_TOKENS) - 3)
    for name in tables:
        before, after = text[name], made[name]
        assert torch.equal(after[:seen], before[:seen])
        assert torch.equal(after[new.stop :], before[new.stop :])
        assert not torch.equal(after[new], before[new])
        assert after[new].std() == pytest.approx(float(before[:seen].std()), rel=0.2)


def test_missing_special_tokens_follow_the_last_one(
    donors: tuple[Path, Path], tmp_path: Path
) -> None:
    seen = write_tokenizer(donors[0])
    config = transplant(*donors, tmp_path / "out")
    _, processor = load(tmp_path / "out")
    tokenizer = processor.tokenizer
    ids = [tokenizer.id_of(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(seen - 3, seen + 11))
    assert config.image_token_id == ids[SPECIAL_TOKENS.index("<|image_pad|>")]
    assert config.eos_token_id == tokenizer.id_of("<|im_end|>")
    assert tokenizer.decode(tokenizer.encode_text("two words")) == "two words"


def test_a_second_run_draws_the_same_and_another_seed_does_not(
    donors: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        transplant(*donors, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    differ = {name for name, tensor in a.items() if not torch.equal(tensor, c[name])}
    merger = {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}
    assert differ == {"model.embed_tokens.weight", *merger}


def test_vision_tokens_begin_as_large_as_words(donors: tuple[Path, Path], tmp_path: Path) -> None:
    transplant(*donors, tmp_path / "out", dtype=torch.float32)
    model, _ = load(tmp_path / "out", dtype="float32")
    hidden_NE = 7.0 * torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows_MD = model.visual.merger(hidden_NE)
    words = model.model.embed_tokens.weight.square().mean().sqrt()
    assert rows_MD.square().mean().sqrt().item() == pytest.approx(words.item(), rel=0.15)


def test_a_target_that_is_there_is_left_alone(donors: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        transplant(*donors, tmp_path / "out")


def test_a_table_without_room_for_the_new_tokens_is_refused(
    donors: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = write_tokenizer(donors[0])
    write_text(tmp_path / "small", vocab_size=rows)
    with pytest.raises(
        CheckpointError, match=rf"has {rows} rows for words, .*are {rows + 11} tokens"
    ):
        transplant(tmp_path / "small", donors[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert rows < VOCABULARY


def test_a_tensor_that_does_not_fit_is_named(donors: tuple[Path, Path], tmp_path: Path) -> None:
    write_text(tmp_path / "wrong")
    path = tmp_path / "wrong" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"12 tensors do not fit.*model\.layers\.2\.input_la"):
        transplant(tmp_path / "wrong", donors[1], tmp_path / "out")
