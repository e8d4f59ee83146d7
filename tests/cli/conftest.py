"""Fixtures: a tiny model folder on disk, an image file, and `run` (the command in process)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from qwen2vl.cli.main import main
from qwen2vl.processor.image import PixelLimits
from qwen2vl.weights import save_folder
from tests.parity.reference import random_model
from tests.tiny import tiny_config, tiny_tokenizer_dir

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(tie_word_embeddings=False)
    save_folder(
        folder,
        config=config,
        state_dict=random_model(config, seed=1).state_dict(),
        tokenizer_folder=tiny_tokenizer_dir(),
        pixels=PixelLimits(min_pixels=3136, max_pixels=12845056),
        dtype=torch.float32,
    )
    return folder


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    Image.effect_noise((150, 100), 80).convert("RGB").save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command in an empty folder; stdout and stderr are captured separately."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
        assert "Traceback" not in result.output
        return result

    return call
