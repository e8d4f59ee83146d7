"""Sampling of the frozen suite `lines`: python -m dev.suites.lines.

One line of text in a picture, in typefaces that training never sees (dataset test-fonts), one part
for each script. Two thirds are black on white; the others have a color pair of a contrast of at
least 4.5. Some pictures are blurred a little or compressed as JPEG. The answer is the text in
logical order, also of scripts that are written from right to left. This was run once: running it
again after synth/ has changed gives another suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from dev.suites.line_texts import (
    TextSource,
    has_clear_case,
    sample_english,
    sample_names,
    sample_number,
)
from qwen2vl.eval.suites.frozen_suite import (
    FrozenHeader,
    FrozenItem,
    Part,
    write_frozen_suite,
)
from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.colors import contrast, sample_ground
from qwen2vl.synth.compositing import Composite, Ground, Text
from qwen2vl.synth.compositing.text import DATASET, text_extent
from qwen2vl.synth.spec import RGB

__all__ = ["PARTS", "SEED", "LinePart", "draw_items", "freeze"]

SEED = 20261129
FILE = FROZEN / "lines.jsonl"
QUESTIONS = ("Read the text.", "What is written here?", "What does the text say?")

MAX_SIZE = 48  # pixels per em
PADDING = (4, 24)  # pixels on each side of the ink
COLOR_SHARE = 1 / 3
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
MIN_CONTRAST = 4.5  # WCAG 2, level AA, of text
JPEG_SHARE, JPEG_QUALITY = 0.2, (60, 90)
BLUR_SHARE, BLUR_RADIUS, MIN_BLURRED_SIZE = 0.15, (0.4, 0.9), 24  # pixels

Faces = Mapping[str, tuple[str, ...]]  # family -> "PACKAGE/FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePart:
    """The lines of one script."""

    source: TextSource
    faces: Faces
    count: int = 80
    min_size: int = 14  # pixels per em at which the script is legible


def _files(package: str, stems: str, suffix: str) -> tuple[str, ...]:
    return tuple(f"{package}/{stem}{suffix}" for stem in stems.split())


_LIBERTINE = _files(
    "fonts-linuxlibertine", "LinLibertine_R LinLibertine_RI LinLibertine_RB", ".otf"
)
_BIOLINUM = _files("fonts-linuxlibertine", "LinBiolinum_R LinBiolinum_RI LinBiolinum_RB", ".otf")
_MONO = _files("fonts-linuxlibertine", "LinLibertine_M", ".otf")
_GENTIUM = _files("fonts-sil-gentium", "Gentium-R Gentium-I", ".ttf")
_DKG = _files("fonts-dkg-handwriting", "dkg dkgBd", ".ttf")
_HUMOR = _files("fonts-humor-sans", "Humor-Sans", ".ttf")

_PRINTED: Faces = {
    "Linux Libertine": _LIBERTINE,
    "Linux Biolinum": _BIOLINUM,
    "Linux Libertine Mono": _MONO,
    "Gentium": _GENTIUM,
}
_HANDWRITTEN: Faces = {"dkg handwriting": _DKG, "Humor Sans": _HUMOR}
# Humor Sans draws small letters as capitals; the capitals of dkg handwriting overlap.
_CASE_OF: Mapping[str, Callable[[str], str]] = {
    **dict.fromkeys(_HUMOR, str.upper),
    **dict.fromkeys(_DKG, str.lower),
}
# Humor Sans: little faces in place of £ and €, a comma like a full stop; dkg: scrawled signs.
_WRONG_GLYPHS = {**dict.fromkeys(_HUMOR, "£€,"), **dict.fromkeys(_DKG, "$£%&")}


def _source(
    languages: str, scripts: str, *, max_length: int = 24, separator: str = " "
) -> TextSource:
    return TextSource(
        languages=tuple(languages.split()),
        scripts=tuple(scripts.split()),
        max_length=max_length,
        separator=separator,
    )


PARTS: Mapping[str, LinePart] = {
    "latin": LinePart(source=_source("en", "LATIN"), faces={**_PRINTED, **_HANDWRITTEN}, count=100),
    "latin_accents": LinePart(
        source=TextSource(
            languages=tuple("de fr es pt it sv pl cs hu ro tr vi".split()),
            scripts=("LATIN",),
            has_case=True,
            needs_accent=True,
        ),
        faces=_PRINTED,
        count=96,
    ),
    "digits": LinePart(source=_source("", ""), faces={**_PRINTED, **_HANDWRITTEN}, count=100),
    "greek": LinePart(
        source=TextSource(languages=("el",), scripts=("GREEK",), has_case=True),
        faces={
            "GFS Didot": _files("fonts-gfs-didot", "GFSDidot GFSDidotBold GFSDidotItalic", ".otf"),
            "Linux Libertine": _LIBERTINE,
            "Linux Biolinum": _BIOLINUM,
            "Gentium": _GENTIUM,
        },
    ),
    "cyrillic": LinePart(
        source=TextSource(
            languages=tuple("ru uk bg sr be mk".split()), scripts=("CYRILLIC",), has_case=True
        ),
        faces={
            "Linux Libertine": _LIBERTINE,
            "Linux Biolinum": _BIOLINUM,
            "Gentium": _GENTIUM[:1],
        },
    ),
    "hebrew": LinePart(
        source=_source("he", "HEBREW"),
        faces={
            "David CLM": _files("culmus", "DavidCLM-Medium DavidCLM-Bold", ".otf"),
            "Frank Ruehl CLM": _files("culmus", "FrankRuehlCLM-Medium FrankRuehlCLM-Bold", ".ttf"),
            "Hadasim CLM": _files("culmus", "HadasimCLM-Regular HadasimCLM-Bold", ".ttf"),
            "Miriam CLM": _files("culmus", "MiriamCLM-Book MiriamMonoCLM-Book", ".ttf"),
            "Nachlieli CLM": _files("culmus", "NachlieliCLM-Light NachlieliCLM-Bold", ".otf"),
            "Simple CLM": _files("culmus", "SimpleCLM-Medium", ".ttf"),
        },
        min_size=16,
    ),
    "arabic": LinePart(
        # Persian and Urdu have letters that only differ from Arabic ones by their code points.
        source=_source("ar", "ARABIC"),
        faces={
            "KacstBook": _files("fonts-kacst", "KacstBook", ".ttf"),
            "KacstNaskh": _files("fonts-kacst", "KacstNaskh", ".ttf"),
            "KacstOffice": _files("fonts-kacst", "KacstOffice", ".ttf"),
            "KacstScreen": _files("fonts-kacst", "KacstScreen", ".ttf"),
            "KacstTitle": _files("fonts-kacst", "KacstTitle", ".ttf"),
            "Scheherazade": _files(
                "fonts-sil-scheherazade", "Scheherazade-Regular Scheherazade-Bold", ".ttf"
            ),
        },
        min_size=24,
    ),
    "hangul": LinePart(
        source=_source("ko", "HANGUL", max_length=16),
        faces={
            "UnBatang": _files("fonts-unfonts-core", "UnBatang UnBatangBold", ".ttf"),
            "UnDotum": _files("fonts-unfonts-core", "UnDotum UnDotumBold", ".ttf"),
            "UnDinaru": _files("fonts-unfonts-core", "UnDinaru", ".ttf"),
            "UnGraphic": _files("fonts-unfonts-core", "UnGraphic", ".ttf"),
            "UnGungseo": _files("fonts-unfonts-core", "UnGungseo", ".ttf"),
            "UnPilgi": _files("fonts-unfonts-core", "UnPilgi", ".ttf"),
        },
        min_size=18,
    ),
    "japanese": LinePart(
        source=_source("ja", "CJK HIRAGANA KATAKANA", max_length=16, separator=""),
        faces={
            "VL Gothic": _files("fonts-vlgothic", "VL-Gothic-Regular VL-PGothic-Regular", ".ttf")
        },
        min_size=20,
    ),
    "han": LinePart(
        source=_source("zh zh-Hant", "CJK", max_length=16, separator=""),
        faces={"AR PL UKai": _files("fonts-arphic-ukai", "ukai", ".ttc")},
        min_size=22,
    ),
    "devanagari": LinePart(
        source=_source("hi mr ne", "DEVANAGARI"),
        faces={
            "Lohit Devanagari": _files("fonts-lohit-deva", "Lohit-Devanagari", ".ttf"),
            "Annapurna SIL": _files(
                "fonts-sil-annapurna", "AnnapurnaSIL-Regular AnnapurnaSIL-Bold", ".ttf"
            ),
        },
        min_size=20,
    ),
    "bengali": LinePart(
        source=_source("bn as", "BENGALI"),
        faces={"Lohit Bengali": _files("fonts-lohit-beng-bengali", "Lohit-Bengali", ".ttf")},
        min_size=20,
    ),
    "tamil": LinePart(
        source=_source("ta", "TAMIL"),
        faces={"Lohit Tamil": _files("fonts-lohit-taml", "Lohit-Tamil", ".ttf")},
        min_size=20,
    ),
    "thai": LinePart(
        source=_source("th", "THAI"),
        faces={
            "Loma": _files("fonts-tlwg-loma-otf", "Loma Loma-Bold Loma-Oblique", ".otf"),
            "Purisa": _files("fonts-tlwg-purisa-otf", "Purisa Purisa-Bold", ".otf"),
        },
        min_size=20,
    ),
    "khmer": LinePart(
        source=_source("km", "KHMER"),
        faces={
            "Khmer OS": _files(
                "fonts-khmeros", "KhmerOS KhmerOSsys KhmerOSbattambang KhmerOSsiemreap", ".ttf"
            ),
            "Khmer OS Bokor": _files("fonts-khmeros", "KhmerOSbokor", ".ttf"),
        },
        min_size=22,
    ),
    "myanmar": LinePart(
        source=_source("my", "MYANMAR"),
        faces={
            "Padauk": _files(
                "fonts-sil-padauk", "Padauk-Regular Padauk-Bold PadaukBook-Regular", ".ttf"
            )
        },
        min_size=20,
    ),
    "ethiopic": LinePart(
        source=_source("am ti", "ETHIOPIC", max_length=20),
        faces={"Abyssinica SIL": _files("fonts-sil-abyssinica", "AbyssinicaSIL-Regular", ".ttf")},
        min_size=20,
    ),
}


def freeze(path: Path = FILE) -> None:
    """Write the suite.

    Raises:
        DatasetNotFoundError, FontError: the datasets names or test-fonts, or raqm are absent.
    """
    parts = {name: Part(note=_note(part)) for name, part in PARTS.items()}
    faces = sorted(
        {file for part in PARTS.values() for files in part.faces.values() for file in files}
    )
    header = FrozenHeader(
        suite="lines", parts=parts, max_tokens=128, held_out={"fonts": tuple(faces)}
    )
    items = [item for name in PARTS for item in draw_items(name)]
    write_frozen_suite(path, header, items)


def draw_items(name: str, count: int | None = None) -> Iterator[FrozenItem]:
    """Sample the lines of a part, all different; languages take turns.

    Args:
        name: of the part.
        count: only the first ones; they do not depend on it.

    Raises:
        DatasetNotFoundError, FontError: as `freeze` does.
    """
    part, rng, seen = PARTS[name], Random(f"{SEED} {name}"), set[str]()
    languages = part.source.languages or ("und",)
    for index in range(part.count if count is None else count):
        language = languages[index % len(languages)]
        while True:
            font = rng.choice(part.faces[rng.choice(sorted(part.faces))])
            text = _sample_text(rng, name, language)
            text = _CASE_OF.get(font, str)(text)
            if text not in seen and covers(font, text) and has_clear_case(text):
                break
        seen.add(text)
        yield FrozenItem(
            id=f"{name}/{index:03d}",
            part=name,
            kind=name,  # the questions of a part do not name its languages
            question=rng.choice(QUESTIONS),
            answers=(text,),
            metric="edit_distance",
            pictures=(_sample_picture(rng, text, font, part.min_size),),
        )


def _sample_text(rng: Random, name: str, language: str) -> str:
    source = PARTS[name].source
    if name == "digits":
        return sample_number(rng)
    if name == "latin":
        return sample_english(rng, source.max_length)
    while True:
        text = sample_names(rng, source, language)
        if not source.needs_accent or not text.isascii():
            return text


def _sample_picture(rng: Random, text: str, font: str, min_size: int) -> Composite:
    """Sample size, padding, colors and effects; all of the ink is inside the canvas."""
    size = rng.randint(min_size, MAX_SIZE)
    left, top, right, bottom = text_extent(text, font, size)
    pads = [rng.randint(*PADDING) for _ in range(4)]
    ink, ground = _sample_colors(rng) if rng.random() < COLOR_SHARE else (BLACK, WHITE)
    is_blurred = rng.random() < BLUR_SHARE and size >= MIN_BLURRED_SIZE
    blur = round(rng.uniform(*BLUR_RADIUS), 1) if is_blurred else 0.0
    jpeg_quality = rng.randint(*JPEG_QUALITY) if rng.random() < JPEG_SHARE else 0
    return Composite(
        width=pads[0] + right - left + pads[1],
        height=pads[2] + bottom - top + pads[3],
        ground=Ground(rgb=ground),
        layers=(Text(text=text, font=font, size=size, x=pads[0] - left, y=pads[2] - top, rgb=ink),),
        blur=blur,
        jpeg_quality=jpeg_quality,
    )


def _sample_colors(rng: Random) -> tuple[RGB, RGB]:
    """Sample (ink, ground) of enough contrast: a plain ground in half of all cases."""
    while True:
        ground = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if rng.random() < 0.5:
            ground = sample_ground(rng)
        ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if contrast(ink, ground) >= MIN_CONTRAST:
            return ink, ground


@cache
def _characters(font: str) -> frozenset[str]:
    """Return the characters that a file of the dataset draws as what they are."""
    from fontTools.ttLib import TTFont  # an optional dependency

    with TTFont(dataset_folder(DATASET) / font, fontNumber=0, lazy=True) as opened:
        return frozenset(map(chr, opened.getBestCmap() or ())) - {*_WRONG_GLYPHS.get(font, "")}


def covers(font: str, text: str) -> bool:
    """Return whether a file of the dataset has a glyph for every character."""
    return set(text) <= _characters(font)


def _note(part: LinePart) -> str:
    languages = " ".join(part.source.languages)
    of = f"languages {languages}; " if languages else ""
    return f"{of}unseen faces: {', '.join(part.faces)}"


if __name__ == "__main__":
    freeze()
