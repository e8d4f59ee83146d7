"""Fonts: disjoint sets, full glyph coverage, and errors that name the packages to install."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from qwen2vl.synth import fonts
from qwen2vl.synth.draw import CHARACTERS
from qwen2vl.synth.fonts import (
    BUNDLED_FAMILIES,
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
from tests.requirements import needs_judge_fonts, needs_training_fonts, needs_validation_fonts

GROUPS = [
    "bundled",
    pytest.param("mono2", marks=needs_training_fonts),
    pytest.param("all", marks=needs_training_fonts),
    pytest.param("validation", marks=needs_validation_fonts),
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


# The files of the Debian packages that font_files/README.md names.
BUNDLED_DIGESTS = {
    "Cabin-Bold.otf": "f2a43add6a75ae9b203744857fe3e612a4b038b51585934208b1b5e5b7f455dd",
    "Cabin-Italic.otf": "b9ec8445102fb15bd1eb5c10d2c0c4049154bcf60fcf2527d0bf06362c9f6e26",
    "Cabin-Regular.otf": "28b2901516089b2bf9d3c2b3dd86a1c875de7f3997bc4ebf4a651a8150aa49dc",
    "Caladea-Bold.ttf": "ae3cb2dcbc925809dd29d2a44e9802211cab66be541bacbfc9c08c74b27c3742",
    "Caladea-Italic.ttf": "4359a8e24f748b6447b1ff6d7a174febe70961d29f8bb8634b56dacd740a3deb",
    "Caladea-Regular.ttf": "f1e899278b7b4491aba5b6a8253c4b04c050cc59b21865be5c37559a775153cd",
    "Courier Prime Bold.otf": "a414b06c018ed4b65c407da05ac54f93cdaf375570480b7e466220db6edc5ce0",
    "Courier Prime.otf": "26bb2ce38aa96cdc76077fbd64017beb3adc8177f84ec1e6015831d038bc0585",
}


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_bundled_fonts_are_unmodified_judge_families_with_their_license() -> None:
    assert BUNDLED_FAMILIES.items() <= JUDGE_FAMILIES.items()
    files = [file for family in files_of("bundled") for file in family]
    assert sorted(files) == sorted(BUNDLED_DIGESTS)
    assert {file: _digest(fonts.font_path(file)) for file in files} == BUNDLED_DIGESTS
    folder = Path(fonts.font_path(files[0])).parent
    assert {path.name for path in folder.iterdir()} == {*files, "OFL.txt", "README.md"}
    notice = (folder / "OFL.txt").read_text(encoding="utf-8")
    assert all(file in notice for file in files)
    assert "SIL OPEN FONT LICENSE Version 1.1" in notice


def test_another_version_on_the_system_does_not_replace_a_bundled_font(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(fonts.font_path("Cabin-Regular.otf"), tmp_path / "Cabin-Bold.otf")
    shutil.copy(fonts.font_path("Cabin-Regular.otf"), tmp_path / "Inconsolata.otf")
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path),))
    found = fonts._installed.__wrapped__()
    assert found["Inconsolata.otf"] == str(tmp_path / "Inconsolata.otf")
    assert _digest(found["Cabin-Bold.otf"]) == BUNDLED_DIGESTS["Cabin-Bold.otf"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_face_has_every_character(group: str) -> None:
    for file in (file for family in files_of(group) for file in family):
        check_coverage(file, CHARACTERS)
        table = glyphs(file, 24, CHARACTERS)
        empty = [char for char, glyph in table.items() if not glyph.mask.size]
        assert empty == [" "], file


@pytest.mark.parametrize("group", GROUPS)
def test_glyphs_of_a_face_differ(group: str) -> None:
    """A font without glyphs draws every character as the same box (tofu)."""
    for file in (file for family in files_of(group) for file in family):
        table = glyphs(file, 40, CHARACTERS)
        drawn = {(g.mask.shape, g.mask.tobytes()) for c, g in table.items() if c not in "Il',-"}
        assert len(drawn) == len(CHARACTERS) - 5, file


def test_missing_glyph_is_an_error() -> None:
    with pytest.raises(FontError, match=r"font Cabin-Bold\.otf: no glyph for '\\U000f0000'"):
        check_coverage("Cabin-Bold.otf", "A\U000f0000")


@needs_training_fonts
def test_stems_look_alike_detects_bare_stems() -> None:
    assert stems_look_alike("LiberationSans-Regular.ttf")
    assert stems_look_alike("FreeSansOblique.ttf")
    assert not stems_look_alike("LiberationSerif-Regular.ttf")
    assert not stems_look_alike("DejaVuSansMono.ttf")
    assert not stems_look_alike("NotoSans-Regular.ttf")  # its I has serifs


def test_errors_about_missing_fonts_name_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", dict)
    files_of.cache_clear()
    with pytest.raises(FontError, match=r"DejaVuSansMono\.ttf and 1 more .*fonts-liberation2$"):
        files_of("mono2")
    with pytest.raises(FontError, match="apt-get install fonts-cabin fonts-cantarell"):
        files_of("judge")
    with pytest.raises(FontError, match=r"apt-get install fonts-lato$"):
        glyphs("Lato-Bold.ttf", 99, "A")
