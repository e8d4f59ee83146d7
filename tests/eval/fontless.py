"""A machine without fonts, for the tests of what is said then."""

from __future__ import annotations

import pytest

from qwen2vl.synth import fonts


def hide_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no font be found until the test ends."""
    no_fonts: dict[str, str] = {}
    monkeypatch.setattr(fonts, "_installed", lambda: no_fonts)
    fonts.files_of.cache_clear()
