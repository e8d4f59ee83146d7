"""All task families as parameters of a test, each with what its pictures need."""

from __future__ import annotations

import pytest

from qwen2vl.synth.spec import FAMILY_NAMES
from tests.requirements import needs_dataset, needs_line_fonts, needs_training_fonts

__all__ = ["FAMILY_PARAMETERS"]

_ICONS = (needs_dataset("named-pictures"), needs_training_fonts)
_MARKS = {
    **dict.fromkeys(("objects", "named", "refusals", "clips"), _ICONS),
    "lines": (needs_dataset("names"), needs_line_fonts),
}
FAMILY_PARAMETERS = [pytest.param(name, marks=_MARKS.get(name, ())) for name in FAMILY_NAMES]
