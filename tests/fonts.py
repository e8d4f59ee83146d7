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


def _needs(group: str) -> pytest.MarkDecorator:
    why = _missing(group)
    return pytest.mark.skipif(bool(why) and not os.environ.get("CI"), reason=why)


needs_training_fonts = _needs("all")
needs_judge_fonts = _needs("judge")
