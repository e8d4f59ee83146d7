"""Typefaces that training draws, by script: those of fonts.py and of tables.py that cover it.

    face = sample_face(rng, "greek")
    covers(face, "αβγ")

A typeface is as frequent as any other, whatever its number of faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from qwen2vl.synth.fonts import TRAINING_FAMILIES, check_installed, font_path, stems_look_alike
from qwen2vl.synth.scripts.alphabets import find_script
from qwen2vl.synth.scripts.tables import MORE_FAMILIES

__all__ = ["Face", "check_faces", "covers", "faces_of", "packages_of", "sample_face", "unclear_in"]

_OF_TRAINING_FAMILIES = ("latin", "latin_accents", "digits", "greek", "cyrillic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """One face of a typeface."""

    file: str  # "FILE.ttc#2" is the third face of a collection
    has_capitals_only: bool = False
    unclear: str = ""  # characters that it draws like others
    min_size: int = 10  # pixels per em


def check_faces(scripts: Sequence[str]) -> None:
    """Check that the faces of scripts are installed.

    Raises:
        ConfigError: a script is not in the table.
        FontError: faces are missing; the text names the packages to install.
    """
    families = [family for name in scripts for family in _families_of(name)]
    check_installed(sorted({face.file.partition("#")[0] for family in families for face in family}))


@cache
def faces_of(name: str) -> tuple[tuple[Face, ...], ...]:
    """Return the faces of a script by family, after checking that all are installed.

    Raises:
        ConfigError, FontError: as `check_faces` does.
    """
    check_faces((name,))
    return _families_of(name)


def packages_of(name: str) -> tuple[str, ...]:
    """Return the Debian packages of the faces of a script, sorted."""
    packages = {family.package for family in MORE_FAMILIES.values() if name in family.scripts}
    if name in _OF_TRAINING_FAMILIES:
        packages |= {package for package, _ in TRAINING_FAMILIES.values()}
    return tuple(sorted(packages))


def sample_face(rng: Random, name: str) -> Face:
    """Sample a typeface of a script, then one of its faces.

    Raises:
        ConfigError, FontError: as `check_faces` does.
    """
    return rng.choice(rng.choice(faces_of(name)))


def covers(face: Face, text: str) -> bool:
    """Return whether a face draws every character of a text as what it is."""
    known = _code_points(face.file)
    return all(char == " " or (ord(char) in known and char not in face.unclear) for char in text)


@cache
def unclear_in(face: Face) -> str:
    """Return the characters that random texts in a face cannot have: also I if it looks like l."""
    if "#" in face.file:  # a collection, of East Asian faces
        return face.unclear
    # Capitals alone: an I looks like a 1.
    return face.unclear + ("I" if face.has_capitals_only or stems_look_alike(face.file) else "")


@cache
def _families_of(name: str) -> tuple[tuple[Face, ...], ...]:
    find_script(name)
    families: list[tuple[Face, ...]] = []
    if name in _OF_TRAINING_FAMILIES:
        families += [
            tuple(Face(file=file) for file in files) for _, files in TRAINING_FAMILIES.values()
        ]
    for family in MORE_FAMILIES.values():
        if name in family.scripts:
            families.append(
                tuple(
                    Face(
                        file=file,
                        has_capitals_only=family.has_capitals_only,
                        unclear=family.unclear,
                        min_size=family.min_size,
                    )
                    for file in family.files
                )
            )
    return tuple(families)


@cache
def _code_points(file: str) -> frozenset[int]:
    """Read the characters of a face."""
    from fontTools.ttLib import TTFont  # an optional dependency

    name, _, index = file.partition("#")
    with TTFont(font_path(name), fontNumber=int(index or 0), lazy=True) as font:
        # Only the code points are needed; names of the glyphs take seconds in large fonts.
        font.setGlyphOrder([""] * font["maxp"].numGlyphs)
        return frozenset(font.getBestCmap() or ())
