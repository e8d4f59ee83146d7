"""Fixture: a registry in a folder, with clients that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fetch.archives import Registry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path / "datasets"))
    return Registry(tmp_path, monkeypatch)
