"""Fonts: disjoint sets, whole coverage, and help when they are missing."""

from __future__ import annotations

import pytest

from qwen2vl.synth import fonts
from qwen2vl.synth.draw import CHARACTERS
from qwen2vl.synth.fonts import (
    JUDGE_FAMILIES,
    JUDGE_PACKAGES,
    TRAINING_FAMILIES,
    TRAINING_PACKAGES,
    VALIDATION_FAMILIES,
    FontError,
    check_coverage,
    files_of,
    glyphs,
    stems_look_alike,
)
from tests.fonts import needs_judge_fonts, needs_training_fonts

GROUPS = [
    pytest.param("mono2", marks=needs_training_fonts),
    pytest.param("all", marks=needs_training_fonts),
    pytest.param("validation", marks=needs_training_fonts),
    pytest.param("judge", marks=needs_judge_fonts),
]


def test_training_packages_are_the_seven() -> None:
    assert TRAINING_PACKAGES == (
        "fonts-dejavu-core",
        "fonts-freefont-ttf",
        "fonts-lato",
        "fonts-liberation2",
        "fonts-noto-core",
        "fonts-open-sans",
        "fonts-roboto",
    )
    assert not set(TRAINING_PACKAGES) & set(JUDGE_PACKAGES)


def test_families_and_files_belong_to_one_set() -> None:
    tables = [TRAINING_FAMILIES, VALIDATION_FAMILIES, JUDGE_FAMILIES]
    families = [family for table in tables for family in table]
    files = [file for table in tables for _, own in table.values() for file in own]
    assert len(families) == len(set(families))
    assert len(files) == len(set(files))


@pytest.mark.parametrize("group", GROUPS)
def test_every_face_has_every_character(group: str) -> None:
    for file in (file for family in files_of(group) for file in family):
        check_coverage(file, CHARACTERS)
        table = glyphs(file, 24, CHARACTERS)
        empty = [char for char, glyph in table.items() if not glyph.mask.size]
        assert empty == [" "], file


@pytest.mark.parametrize("group", GROUPS)
def test_letters_of_a_face_differ(group: str) -> None:
    """Tofu draws every character alike."""
    for file in (file for family in files_of(group) for file in family):
        table = glyphs(file, 40, CHARACTERS)
        drawn = {(g.mask.shape, g.mask.tobytes()) for c, g in table.items() if c not in "Il',-"}
        assert len(drawn) == len(CHARACTERS) - 5, file


@needs_training_fonts
def test_missing_character_is_refused() -> None:
    with pytest.raises(FontError, match=r"font DejaVuSans\.ttf: no glyph for '\\U000f0000'"):
        check_coverage("DejaVuSans.ttf", "A\U000f0000")


@needs_training_fonts
def test_bare_stems_are_found() -> None:
    assert stems_look_alike("LiberationSans-Regular.ttf")
    assert stems_look_alike("FreeSansOblique.ttf")
    assert not stems_look_alike("LiberationSerif-Regular.ttf")
    assert not stems_look_alike("DejaVuSansMono.ttf")
    assert not stems_look_alike("NotoSans-Regular.ttf")  # its I has serifs


def test_missing_fonts_name_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", dict)
    files_of.cache_clear()
    with pytest.raises(FontError, match=r"DejaVuSansMono\.ttf and 1 more .*fonts-liberation2$"):
        files_of("mono2")
    with pytest.raises(FontError, match="apt-get install fonts-cabin fonts-cantarell"):
        files_of("judge")
    with pytest.raises(FontError, match=r"apt-get install fonts-lato$"):
        glyphs("Lato-Bold.ttf", 99, "A")
