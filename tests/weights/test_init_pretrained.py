"""A checkpoint built from two source models: what is copied, converted, drawn and dropped.

tests/parity/test_init_pretrained.py compares the blocks' outputs with those of the source models.
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
from qwen2vl.weights.init_pretrained import init_from_pretrained
from tests.source_models import (
    DEPTH,
    VOCABULARY,
    WIDTH,
    write_open_clip,
    write_qwen2,
    write_tokenizer,
)


@pytest.fixture
def source_models(tmp_path: Path) -> tuple[Path, Path]:
    write_qwen2(tmp_path / "text")
    write_open_clip(tmp_path / "vision")
    return tmp_path / "text", tmp_path / "vision"


def test_folder_is_a_complete_model(source_models: tuple[Path, Path], tmp_path: Path) -> None:
    config = init_from_pretrained(*source_models, tmp_path / "out")
    assert (config.vision.depth, config.vision.embed_dim) == (DEPTH, WIDTH)
    assert config.vision.hidden_size == config.text.hidden_size == 64
    assert config.vision.temporal_patch_size == 2
    assert config.text.mrope_section == (2, 3, 3)
    assert config.text.max_position_embeddings == 32768  # the source's 131072 was never trained
    assert config.text.rope_theta == 1e6
    assert read_config(tmp_path / "out") == config
    model, processor = load(tmp_path / "out", dtype="float32")
    assert processor.pixels.max_pixels == 12845056
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == expected_shapes(config)


def test_image_mean_and_std_are_those_of_the_vision_tower(
    source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    config = init_from_pretrained(*source_models, tmp_path / "out")
    assert config.vision.image_mean == (0.5, 0.4, 0.3)
    assert config.vision.image_std == (0.3, 0.2, 0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_is_copied_except_for_new_tokens_embeddings(
    tied: bool, source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    text = write_qwen2(tmp_path / "again", tie_word_embeddings=tied)
    num_tokens = write_tokenizer(tmp_path / "again")
    init_from_pretrained(
        tmp_path / "again", source_models[1], tmp_path / "out", dtype=torch.float32
    )
    state = load_file(tmp_path / "out" / "model.safetensors")
    tables = {"model.embed_tokens.weight", "lm_head.weight"} & text.keys()
    for name, tensor in text.items():
        if name not in tables:
            assert torch.equal(state[name], tensor), name
    new_rows = slice(num_tokens, num_tokens + len(SPECIAL_TOKENS) - 3)
    for name in tables:
        before, after = text[name], state[name]
        assert torch.equal(after[:num_tokens], before[:num_tokens])
        assert torch.equal(after[new_rows.stop :], before[new_rows.stop :])
        assert not torch.equal(after[new_rows], before[new_rows])
        assert after[new_rows].std() == pytest.approx(float(before[:num_tokens].std()), rel=0.2)


def test_missing_special_tokens_are_appended(
    source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    num_tokens = write_tokenizer(source_models[0])
    config = init_from_pretrained(*source_models, tmp_path / "out")
    _, processor = load(tmp_path / "out")
    tokenizer = processor.tokenizer
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(num_tokens - 3, num_tokens + 11))
    assert config.image_token_id == ids[SPECIAL_TOKENS.index("<|image_pad|>")]
    assert config.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.decode(tokenizer.encode_text("two words")) == "two words"


def test_random_weights_depend_on_the_seed(
    source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_from_pretrained(*source_models, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    differ = {name for name, tensor in a.items() if not torch.equal(tensor, c[name])}
    merger = {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}
    assert differ == {"model.embed_tokens.weight", *merger}


def test_vision_embeddings_have_the_rms_of_token_embeddings(
    source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    init_from_pretrained(*source_models, tmp_path / "out", dtype=torch.float32)
    model, _ = load(tmp_path / "out", dtype="float32")
    hidden_NE = 7.0 * torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vision_MD = model.visual.merger(hidden_NE)
    embedding_rms = model.model.embed_tokens.weight.square().mean().sqrt()
    assert vision_MD.square().mean().sqrt().item() == pytest.approx(embedding_rms.item(), rel=0.15)


def test_existing_target_is_refused(source_models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
        init_from_pretrained(*source_models, tmp_path / "out")


def test_embedding_without_rows_for_new_tokens_is_refused(
    source_models: tuple[Path, Path], tmp_path: Path
) -> None:
    num_tokens = write_tokenizer(source_models[0])
    write_qwen2(tmp_path / "small", vocab_size=num_tokens)
    with pytest.raises(
        CheckpointError,
        match=rf"the embedding has {num_tokens} rows, .*are {num_tokens + 11} tokens",
    ):
        init_from_pretrained(tmp_path / "small", source_models[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert num_tokens < VOCABULARY


def test_missing_tensors_are_named(source_models: tuple[Path, Path], tmp_path: Path) -> None:
    write_qwen2(tmp_path / "wrong")
    path = tmp_path / "wrong" / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"12 tensors do not fit.*model\.layers\.2\.input_la"):
        init_from_pretrained(tmp_path / "wrong", source_models[1], tmp_path / "out")
