"""Fixtures: a model in float32, and an adapter of the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2vl.cli import options
from tests.adapters import TEXT, write_adapter


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load in float32, so that answers do not depend on what else runs."""
    real = options.load_model_from_options

    def load(given: dict[str, Any], **arguments: Any) -> Any:
        return real({**given, "dtype": "float32"}, **arguments)

    monkeypatch.setattr(options, "load_model_from_options", load)


@pytest.fixture(scope="session")
def tiny_adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an adapter of the tiny model."""
    from qwen2vl import load

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model, _ = load(tiny_folder, dtype="float32")
    write_adapter(folder, model, TEXT)
    return folder
