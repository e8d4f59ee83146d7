"""What tests need beyond `make setup`: they skip where it is absent, unless it is required.

QWEN2VL_REQUIRE names what must be there, separated by commas: fonts (the Debian packages of
qwen2vl/synth/fonts.py and scripts/tables.py), tesseract, tokenizer (the official one, beside the
repository), chromium, imagemagick, kernels (a C++ compiler), datasets (those of `qwen2vl
fetch-data`).
A test that needs a required resource which is absent fails and gives the reason. Nothing is looked
for before such a test runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

from qwen2vl.fetch import is_fetched
from qwen2vl.linear.cpu.library import describe_kernels, load_kernels
from qwen2vl.synth.fonts import FontError, files_of
from qwen2vl.synth.scripts.alphabets import SCRIPTS
from qwen2vl.synth.scripts.faces import check_faces

VARIABLE = "QWEN2VL_REQUIRE"
RESOURCES = ("fonts", "tesseract", "tokenizer", "chromium", "imagemagick", "kernels", "datasets")
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")

# Beside the repository, because it is too large to be a part of it.
TOKENIZER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tokenizer"


def required_resources() -> set[str]:
    """Read QWEN2VL_REQUIRE.

    Raises:
        pytest.UsageError: it names a resource that does not exist.
    """
    names = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}
    unknown = ", ".join(sorted(names - set(RESOURCES)))
    if unknown:
        raise pytest.UsageError(f"{VARIABLE}: unknown {unknown}; known are {', '.join(RESOURCES)}")
    return names


def skip_or_fail(resource: str, reason: str) -> NoReturn:
    """End a test whose resource is absent: skip it, or fail it where the resource is required."""
    if resource in required_resources():
        pytest.fail(f"{reason} ({VARIABLE} names {resource})", pytrace=False)
    pytest.skip(reason)


def check_requirements(item: pytest.Item) -> None:
    """Skip or fail a test that is marked with a resource which is absent."""
    for mark in item.iter_markers("requires"):
        resource, reason_if_absent = mark.args
        reason = reason_if_absent()
        if reason:
            skip_or_fail(resource, reason)


def _requires(resource: str, reason_if_absent: Callable[[], str]) -> pytest.MarkDecorator:
    assert resource in RESOURCES
    return pytest.mark.requires(resource, reason_if_absent)


def _missing_fonts(group: str) -> str:
    try:
        files_of(group)
    except FontError as error:
        return str(error)
    return ""


def _missing_line_fonts() -> str:
    try:
        check_faces(tuple(SCRIPTS))
    except FontError as error:
        return str(error)
    return ""


def _missing_tesseract() -> str:
    return "" if shutil.which("tesseract") else "tesseract is absent: apt-get install tesseract-ocr"


def _missing_chromium() -> str:
    if shutil.which("chromium") is None:
        return "chromium is absent: apt-get install chromium"
    if not any(True for folder in FONT_FOLDERS for _ in Path(folder).expanduser().rglob("*.?tf")):
        return "chromium would show no text, there is no font: apt-get install fonts-dejavu-core"
    return "" if find_spec("playwright") else "playwright is absent: pip install playwright"


def _missing_imagemagick() -> str:
    return "" if shutil.which("convert") else "ImageMagick is absent: apt-get install imagemagick"


def _missing_kernels() -> str:
    return "" if load_kernels() is not None else f"CPU kernels: {describe_kernels()}"


def _missing_dataset(name: str) -> str:
    return "" if is_fetched(name) else f"the dataset is absent: qwen2vl fetch-data {name}"


def missing_tokenizer() -> str:
    """Return why the official tokenizer cannot be used, or nothing."""
    is_there = (TOKENIZER / "tokenizer.json").is_file()
    return "" if is_there else "the official tokenizer is absent: ../shared/data/tokenizer"


needs_training_fonts = _requires("fonts", partial(_missing_fonts, "all"))
needs_line_fonts = _requires("fonts", _missing_line_fonts)
needs_validation_fonts = _requires("fonts", partial(_missing_fonts, "validation"))
needs_judge_fonts = _requires("fonts", partial(_missing_fonts, "judge"))
needs_tesseract = _requires("tesseract", _missing_tesseract)
needs_kernels = _requires("kernels", _missing_kernels)
needs_chromium = _requires("chromium", _missing_chromium)


def needs_dataset(name: str) -> pytest.MarkDecorator:
    """Mark a test that reads a dataset of `qwen2vl fetch-data`."""
    return _requires("datasets", partial(_missing_dataset, name))


needs_imagemagick = _requires("imagemagick", _missing_imagemagick)
