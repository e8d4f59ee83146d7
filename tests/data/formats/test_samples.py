"""Samples: every reason that a sample is refused for has a description."""

from __future__ import annotations

import re
from pathlib import Path

from qwen2vl import data
from qwen2vl.data.formats import describe_reasons, samples


def test_every_reason_of_a_bad_sample_has_a_description() -> None:
    """Find the reasons in the code that raises SampleError."""
    folder = Path(data.__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    reasons = set(re.findall(r'SampleError\(\s*"(\w+)"', code)) | {"image", "video"}
    assert reasons == set(samples._DESCRIPTIONS)


def test_reasons_are_described_most_frequent_first() -> None:
    text = describe_reasons({"answer": 1, "missing": 1200})
    assert text == "1,200 with a missing media file, 1 without an answer to learn from"
