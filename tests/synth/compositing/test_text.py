"""Text of any script: the extent of its ink, shaping, fonts that are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.compositing import text as module
from qwen2vl.synth.compositing.text import (
    check_font,
    has_cached_glyphs,
    text_extent,
    text_mask,
)
from qwen2vl.synth.fonts import BUNDLED_FAMILIES, FontError, font_path
from tests.requirements import needs_dataset, needs_line_fonts, needs_training_fonts

BUNDLED = [file for _, files in BUNDLED_FAMILIES.values() for file in files]
SCRIPTS = {
    "Greek": ("fonts-gfs-didot/GFSDidot.otf", "Καλημέρα"),
    "Arabic": ("fonts-sil-scheherazade/Scheherazade-Regular.ttf", "سلام"),
    "Hebrew": ("culmus/ShofarDemi-Bold.ttf", "שלום"),
    "Devanagari": ("fonts-lohit-deva/Lohit-Devanagari.ttf", "नमस्ते"),
    "Bengali": ("fonts-lohit-beng-bengali/Lohit-Bengali.ttf", "নমস্কার"),
    "Khmer": ("fonts-khmeros/KhmerOS.ttf", "ខ្មែរ"),
    "Burmese": ("fonts-sil-padauk/Padauk-Regular.ttf", "မြန်မာ"),
    "Ethiopic": ("fonts-sil-abyssinica/AbyssinicaSIL-Regular.ttf", "ሰላም"),
    "Korean": ("fonts-unfonts-core/UnBatang.ttf", "한국어"),
}


@pytest.fixture
def shaping() -> None:
    if not features.check("raqm"):
        pytest.skip("Pillow has no raqm layout: apt-get install libfribidi0")


def ink(text: str, font: str, size: int) -> np.ndarray:
    return np.asarray(text_mask(text, font, size, width=400, height=160, x=100, y=90))


def assert_extent_bounds_ink(text: str, font: str, size: int) -> None:
    rows, columns = np.nonzero(ink(text, font, size))
    left, top, right, bottom = text_extent(text, font, size)
    found = (columns.min() - 100, rows.min() - 90, columns.max() - 99, rows.max() - 89)
    assert left <= found[0] and top <= found[1] and found[2] <= right and found[3] <= bottom
    assert found[1] - top <= 1 and bottom - found[3] <= 1
    assert found[0] - left <= size / 3 and right - found[2] <= size / 3  # the advance is wider


@pytest.mark.parametrize("font", BUNDLED)
@pytest.mark.parametrize("text", ["Ag", "fjord.", "W-y&", "."])
@pytest.mark.parametrize("size", [9, 31])
def test_the_extent_bounds_the_ink(font: str, text: str, size: int) -> None:
    assert_extent_bounds_ink(text, font, size)


def test_the_mask_has_the_size_of_the_picture_and_ink_at_the_baseline() -> None:
    mask = text_mask("HE", "Cabin-Bold.otf", 30, width=90, height=50, x=10, y=40)
    assert mask.size == (90, 50) and mask.mode == "L"
    rows, columns = np.nonzero(np.asarray(mask) > 128)
    assert rows.max() == 39 and 10 <= columns.min() <= 14


@needs_dataset("test-fonts")
@pytest.mark.usefixtures("shaping")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_font_of_the_dataset_draws_its_script(script: str) -> None:
    font, text = SCRIPTS[script]
    check_font(font)
    assert_extent_bounds_ink(text, font, 30)
    no_glyphs = ink("\ue123" * len(text), font, 30)  # of the private use area
    assert ink(text, font, 30).sum() > 5000
    assert (ink(text, font, 30) != no_glyphs).any()
    first, last = ink(text[0], font, 30), ink(text[-1], font, 30)
    assert (first != last).any()


@needs_dataset("test-fonts")
@pytest.mark.usefixtures("shaping")
def test_arabic_is_joined() -> None:
    font, text = SCRIPTS["Arabic"]
    left, _, right, _ = text_extent(text, font, 40)
    isolated = sum(right - left for left, _, right, _ in (text_extent(c, font, 40) for c in text))
    assert abs((right - left) - isolated) > 5


@needs_dataset("test-fonts")
@pytest.mark.usefixtures("shaping")
def test_hebrew_is_written_from_the_right() -> None:
    font = SCRIPTS["Hebrew"][0]
    word, first = ink("לו", font, 40), ink("ל", font, 40)  # only the first rises above the line
    top = np.nonzero(first.any(axis=1))[0][0]
    stems = [np.nonzero(mask[top : top + 5].any(axis=0))[0].min() for mask in (word, first)]
    assert stems[0] > stems[1] + 5


@needs_dataset("test-fonts")
@pytest.mark.usefixtures("shaping")
def test_vowel_signs_of_devanagari_are_reordered() -> None:
    font = SCRIPTS["Devanagari"][0]
    joined, letter = ink("कि", font, 40), ink("क", font, 40)
    # The sign that is spoken after the letter stands before it.
    assert np.nonzero(joined.any(axis=0))[0][0] - 100 < 12
    assert joined.sum() > letter.sum()
    assert not (joined[:, 100:120] == letter[:, 100:120]).all()


def test_a_font_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FontError, match=r"NoSuch\.ttf not found"):
        check_font("NoSuch.ttf")
    with pytest.raises(FontError, match=r"NoSuch\.ttf not found"):
        text_extent("a", "NoSuch.ttf", 10)
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    with pytest.raises(DatasetNotFoundError, match="qwen2vl fetch-data test-fonts"):
        check_font("culmus/ShofarDemi-Bold.ttf")


def test_pillow_without_raqm_is_refused_for_fonts_of_the_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "dataset_folder", lambda name: tmp_path)
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(FontError, match=r"raqm.*libfribidi0"):
        check_font("culmus/ShofarDemi-Bold.ttf")
    check_font("Cabin-Bold.otf")


def test_only_training_fonts_at_some_sizes_are_drawn_from_cached_glyphs() -> None:
    fixed = (*BUNDLED, *(font for font, _ in SCRIPTS.values()), "NotoSansArabic-Regular.ttf")
    assert not any(has_cached_glyphs(font, size) for font in fixed for size in range(8, 60))
    for font in ("DejaVuSans.ttf", "Vollkorn-Bold.ttf", "cmuntt.ttf"):
        assert sum(has_cached_glyphs(font, size) for size in range(8, 48)) == 5


@needs_training_fonts
@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "FreeSerifItalic.ttf", "NotoSerif-Bold.ttf"])
@pytest.mark.parametrize("text", ["hinom 230", "Åse.", "жук"])
def test_cached_glyphs_make_the_same_line_where_there_is_no_kerning(font: str, text: str) -> None:
    size = next(size for size in range(20, 29) if has_cached_glyphs(font, size))
    face = ImageFont.truetype(font_path(font), size, layout_engine=ImageFont.Layout.BASIC)
    whole = Image.new("L", (400, 160))
    ImageDraw.Draw(whole).text((100, 90), text, font=face, fill=255, anchor="ls")
    assert_extent_bounds_ink(text, font, size)
    different = np.abs(ink(text, font, size).astype(int) - np.asarray(whole))
    assert different.max() < 80 and different.mean() < 0.1  # where neighbors overlap


@needs_line_fonts
@pytest.mark.usefixtures("shaping")
def test_a_face_of_a_collection_is_chosen_by_its_number() -> None:
    faces = [f"NotoSansCJK-Regular.ttc#{index}" for index in (0, 2)]
    check_font(faces[1])
    japanese, chinese = (ink("直", face, 40) for face in faces)  # drawn differently
    assert japanese.sum() > 10_000 and (japanese != chinese).any()


@needs_line_fonts
@pytest.mark.usefixtures("shaping")
def test_letters_of_installed_fonts_are_shaped() -> None:
    text, font = SCRIPTS["Arabic"][1], "Amiri-Regular.ttf"
    left, _, right, _ = text_extent(text, font, 40)
    isolated = sum(right - left for left, _, right, _ in (text_extent(c, font, 40) for c in text))
    assert abs((right - left) - isolated) > 5
