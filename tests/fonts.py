"""A machine without system fonts: what the package brings is all there is."""

from __future__ import annotations

import pytest

from qwen2vl.synth import fonts


def hide_system_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no font be found but the bundled ones until the test ends."""
    own = {file for _, files in fonts.BUNDLED_FAMILIES.values() for file in files}
    bundled = {file: path for file, path in fonts._installed().items() if file in own}
    monkeypatch.setattr(fonts, "_installed", lambda: bundled)
    fonts.files_of.cache_clear()
