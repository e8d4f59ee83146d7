"""Fonts of the synthetic text images, and their glyphs as cached masks.

Font families are split into training, validation and evaluation ("judge") sets; evaluation families
come from packages that training does not use and are no clones of the others. The tables are fixed,
so that a seed produces the same line of text on every machine; if files are missing, `FontError`
names the packages to install. Ultra-thin, extremely condensed and decorative faces are excluded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from qwen2vl.errors import ConfigError
from qwen2vl.synth.scripts.tables import MORE_FAMILIES

__all__ = [
    "BUNDLED_FAMILIES",
    "JUDGE_FAMILIES",
    "JUDGE_PACKAGES",
    "TRAINING_FAMILIES",
    "TRAINING_PACKAGES",
    "VALIDATION_FAMILIES",
    "FontError",
    "Glyph",
    "check_coverage",
    "check_installed",
    "files_of",
    "font_path",
    "glyphs",
    "stems_look_alike",
]

# family -> (Debian package, files). DejaVu: only the files of the -core package.
TRAINING_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "DejaVu Sans": ("fonts-dejavu-core", ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")),
    "DejaVu Sans Mono": ("fonts-dejavu-core", ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")),
    "DejaVu Serif": ("fonts-dejavu-core", ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf")),
    "FreeMono": ("fonts-freefont-ttf", ("FreeMono.ttf", "FreeMonoBold.ttf")),
    "FreeSans": (
        "fonts-freefont-ttf",
        ("FreeSans.ttf", "FreeSansBold.ttf", "FreeSansOblique.ttf"),
    ),
    "FreeSerif": (
        "fonts-freefont-ttf",
        ("FreeSerif.ttf", "FreeSerifBold.ttf", "FreeSerifItalic.ttf", "FreeSerifBoldItalic.ttf"),
    ),
    "Lato": (
        "fonts-lato",
        ("Lato-Regular.ttf", "Lato-Medium.ttf", "Lato-Bold.ttf", "Lato-Heavy.ttf")
        + ("Lato-Italic.ttf",),
    ),
    "Liberation Mono": (
        "fonts-liberation2",
        ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf", "LiberationMono-Italic.ttf"),
    ),
    "Liberation Sans": (
        "fonts-liberation2",
        ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSans-Italic.ttf"),
    ),
    "Liberation Serif": (
        "fonts-liberation2",
        ("LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf")
        + ("LiberationSerif-Italic.ttf", "LiberationSerif-BoldItalic.ttf"),
    ),
    "Noto Sans": (
        "fonts-noto-core",
        ("NotoSans-Regular.ttf", "NotoSans-Bold.ttf", "NotoSans-Italic.ttf"),
    ),
    "Noto Sans Display": (
        "fonts-noto-core",
        ("NotoSansDisplay-Regular.ttf", "NotoSansDisplay-Bold.ttf"),
    ),
    "Noto Serif": (
        "fonts-noto-core",
        ("NotoSerif-Regular.ttf", "NotoSerif-Bold.ttf", "NotoSerif-Italic.ttf")
        + ("NotoSerif-BoldItalic.ttf",),
    ),
    "Noto Serif Display": (
        "fonts-noto-core",
        ("NotoSerifDisplay-Regular.ttf", "NotoSerifDisplay-Bold.ttf"),
    ),
    "Open Sans": (
        "fonts-open-sans",
        ("OpenSans-Regular.ttf", "OpenSans-Semibold.ttf", "OpenSans-Italic.ttf"),
    ),
}

# Held out of training, from the same packages: shows overfitting during training.
VALIDATION_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Roboto": (
        "fonts-roboto",
        ("Roboto-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Bold.ttf", "Roboto-Italic.ttf"),
    ),
    "Roboto Condensed": (
        "fonts-roboto",
        ("RobotoCondensed-Regular.ttf", "RobotoCondensed-Bold.ttf"),
    ),
}

# Used in neither training nor tuning. Nimbus is excluded (the source of FreeFont), and so are
# Carlito (Lato) and Hack (DejaVu Sans Mono).
JUDGE_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "C059": ("fonts-urw-base35", ("C059-Roman.otf", "C059-Bold.otf", "C059-Italic.otf")),
    "Cabin": ("fonts-cabin", ("Cabin-Regular.otf", "Cabin-Bold.otf", "Cabin-Italic.otf")),
    "Caladea": (
        "fonts-crosextra-caladea",
        ("Caladea-Regular.ttf", "Caladea-Bold.ttf", "Caladea-Italic.ttf"),
    ),
    "Cantarell": ("fonts-cantarell", ("Cantarell-Regular.otf", "Cantarell-Bold.otf")),
    "Courier Prime": (
        "fonts-courier-prime",
        ("Courier Prime.otf", "Courier Prime Bold.otf"),
    ),
    "EB Garamond": ("fonts-ebgaramond", ("EBGaramond12-Regular.otf", "EBGaramond12-Bold.otf")),
    "Inconsolata": ("fonts-inconsolata", ("Inconsolata.otf",)),
}

TRAINING_PACKAGES = tuple(
    sorted({p for p, _ in [*TRAINING_FAMILIES.values(), *VALIDATION_FAMILIES.values()]})
)
JUDGE_PACKAGES = tuple(sorted({package for package, _ in JUDGE_FAMILIES.values()}))

# Included in the package, unmodified: a sans, a serif and a monospaced family of the evaluation
# set. They need no system font; font_files/README.md has versions and licenses.
BUNDLED_FAMILIES = {name: JUDGE_FAMILIES[name] for name in ("Cabin", "Caladea", "Courier Prime")}
_BUNDLED_FOLDER = Path(__file__).with_name("font_files")

_MONO2 = ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf")
_TABLES = {"all": TRAINING_FAMILIES, "validation": VALIDATION_FAMILIES, "judge": JUDGE_FAMILIES}
_FAMILIES_OF = {name: tuple(files for _, files in t.values()) for name, t in _TABLES.items()} | {
    "mono2": tuple((file,) for file in _MONO2),
    "bundled": tuple(files for _, files in BUNDLED_FAMILIES.values()),
}
_PACKAGE_OF = {
    file: package for t in _TABLES.values() for package, files in t.values() for file in files
}
_PACKAGE_OF |= {
    file.partition("#")[0]: family.package
    for family in MORE_FAMILIES.values()
    for file in family.files
}
_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")


class FontError(ConfigError):
    """A font of the synthetic data is not installed, or lacks a character."""


@dataclass(frozen=True, slots=True)
class Glyph:
    """One rasterized character: coverage mask, and its position relative to pen and baseline."""

    mask: NDArray[np.uint8]  # (height, width), ink only
    left: int  # from the pen to the first column
    top: int  # from the baseline to the first row, negative above
    advance: int


@lru_cache
def files_of(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the files of a font set by family, after checking that all are installed.

    Args:
        name: "mono2" (two monospaced faces), "all" (training), "validation", "judge", or "bundled"
            (the part of "judge" that comes with the package).

    Raises:
        FontError: files are missing; the text names the packages to install.
    """
    families = _FAMILIES_OF[name]
    check_installed([file for files in families for file in files])
    return families


def check_installed(files: Sequence[str]) -> None:
    """Check that font files are installed.

    Raises:
        FontError: files are missing; the text names the packages to install.
    """
    missing = [file for file in files if file not in _installed()]
    if missing:
        raise FontError(_remedy(missing))


# Every training face at every size from 12 to 40 makes 1,300 tables of some 45 KB.
@lru_cache(maxsize=2400)
def glyphs(file: str, size: int, characters: str) -> dict[str, Glyph]:
    """Rasterize each of `characters` at `size` pixels per em; the result is cached.

    Raises:
        FontError: the file is not installed.
    """
    face = _face(file, size)
    return {char: _glyph(face, size, char) for char in characters}


@lru_cache
def stems_look_alike(file: str) -> bool:
    """Return whether capital I and small l are both bare stems, which makes them ambiguous.

    A bare stem is as wide in every row; a serif, a tail or a slab is wider than the middle.
    """
    face = _face(file, 96)
    rows = [_glyph(face, 96, char).mask[2:-2].sum(axis=1) for char in "Il"]
    return all(row.max() < 1.2 * np.median(row) for row in rows)


def check_coverage(file: str, characters: str) -> None:
    """Check that the font maps every one of `characters`, so that no label belongs to tofu.

    Raises:
        FontError: the file is not installed, or has no glyph for a character.
    """
    from fontTools.ttLib import TTFont  # an optional dependency, needed for this check only

    with TTFont(font_path(file), lazy=True) as font:
        known = font.getBestCmap() or {}
    missing = "".join(char for char in characters if ord(char) not in known)
    if missing:
        raise FontError(f"font {file}: no glyph for {missing!r}; take it out of the table")


def _face(file: str, size: int) -> ImageFont.FreeTypeFont:
    # BASIC, because raqm is not in every build of Pillow and positions glyphs differently.
    return ImageFont.truetype(font_path(file), size, layout_engine=ImageFont.Layout.BASIC)


def font_path(file: str) -> str:
    """Return where a font of the tables is installed.

    Raises:
        FontError: it is not installed; the text has the package.
    """
    path = _installed().get(file)
    if path is None:
        raise FontError(_remedy([file]))
    return path


def _remedy(missing: list[str]) -> str:
    packages = sorted({_PACKAGE_OF[file] for file in missing if file in _PACKAGE_OF})
    what = f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0]
    remedy = f"apt-get install {' '.join(packages)}" if packages else "no font table names it"
    return f"fonts: {what} not found under {', '.join(_FOLDERS)}; {remedy}"


@lru_cache
def _installed() -> dict[str, str]:
    """Map file names to paths; bundled files take precedence over other versions on the system."""
    found: dict[str, str] = {}
    for folder in (_BUNDLED_FOLDER, *_FOLDERS):
        for root, _, files in os.walk(Path(folder).expanduser()):
            for file in files:
                if file in _PACKAGE_OF:
                    found.setdefault(file, os.path.join(root, file))
    return found


def _glyph(face: ImageFont.FreeTypeFont, size: int, char: str) -> Glyph:
    pad = size  # margin for glyphs that extend beyond their advance box
    advance = round(face.getlength(char))
    image = Image.new("L", (advance + 2 * pad, 3 * size), 0)
    ImageDraw.Draw(image).text((pad, 2 * size), char, font=face, fill=255, anchor="ls")
    box = image.getbbox() or (pad, 2 * size, pad, 2 * size)
    return Glyph(np.asarray(image.crop(box)), box[0] - pad, box[1] - 2 * size, advance)
