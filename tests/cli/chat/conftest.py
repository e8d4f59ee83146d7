"""Fixture: a scripted OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.chat.openai_server import OpenAIServer, openai_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    with openai_server() as running:
        yield running
