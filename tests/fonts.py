"""Skip tests that draw text where the fonts are not installed; under CI their absence fails."""

import os

import pytest

from qwen2vl.synth.fonts import FontError, files_of


def _missing(group: str) -> str:
    try:
        files_of(group)
    except FontError as error:
        return str(error)
    return ""


_WHY = _missing("all")

needs_training_fonts = pytest.mark.skipif(bool(_WHY) and not os.environ.get("CI"), reason=_WHY)
