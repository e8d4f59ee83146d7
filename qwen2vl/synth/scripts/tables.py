"""Typefaces of the family `lines` beyond those of fonts.py: Debian packages and their scripts.

All are free (OFL, Apache, BSD, IPA, ParaType, Expat or public domain; Rufscript: GPL with the font
exception). None is used by an evaluation, derived from such a font, or by the same designer in a
similar style. Faces that are very thin, condensed or decorative are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MORE_FAMILIES", "FontFamily"]

_WESTERN = ("latin", "latin_accents", "digits")
_ASCII = ("latin", "digits")
_EUROPEAN = (*_WESTERN, "greek", "cyrillic")
_ROMAN_CYRILLIC = (*_WESTERN, "cyrillic")
_ROMAN_GREEK = (*_WESTERN, "greek")


@dataclass(frozen=True, slots=True, kw_only=True)
class FontFamily:
    """A typeface: one file for each of its faces."""

    package: str  # of Debian
    files: tuple[str, ...]  # "FILE.ttc#2" is the third face of a collection
    scripts: tuple[str, ...]  # of alphabets.py, in which it is used
    is_shaped: bool = True  # by HarfBuzz: kerning, ligatures, joined letters
    has_capitals_only: bool = False  # small letters look like capitals
    unclear: str = ""  # characters that look like others, or like nothing
    min_size: int = 10  # pixels per em at which it is legible


def _family(
    package: str,
    files: str,
    scripts: tuple[str, ...],
    suffix: str = ".ttf",
    *,
    is_shaped: bool = True,
    has_capitals_only: bool = False,
    unclear: str = "",
    min_size: int = 10,
) -> FontFamily:
    """Create a family of the files "A B" + suffix; "~" in a name is a space."""
    return FontFamily(
        package=package,
        files=tuple(stem.replace("~", " ") + suffix for stem in files.split()),
        scripts=scripts,
        is_shaped=is_shaped,
        has_capitals_only=has_capitals_only,
        unclear=unclear,
        min_size=min_size,
    )


def _noto(name: str, script: str) -> FontFamily:
    stem = f"Noto{name.replace(' ', '')}"
    return _family("fonts-noto-core", f"{stem}-Regular {stem}-Bold", (script,))


def _cjk(style: str, index: int, scripts: tuple[str, ...]) -> FontFamily:
    files = f"Noto{style}CJK-Regular Noto{style}CJK-Bold"
    return _family("fonts-noto-cjk", files, scripts, f".ttc#{index}")


# Scripts of fonts-noto-core, a package of the training fonts: family -> script.
_NOTO_SCRIPTS = {
    "Sans Hebrew": "hebrew",
    "Serif Hebrew": "hebrew",
    "Sans Arabic": "arabic",
    "Naskh Arabic": "arabic",
    "Kufi Arabic": "arabic",
    "Sans Devanagari": "devanagari",
    "Serif Devanagari": "devanagari",
    "Sans Bengali": "bengali",
    "Serif Bengali": "bengali",
    "Sans Tamil": "tamil",
    "Serif Tamil": "tamil",
    "Sans Thai": "thai",
    "Serif Thai": "thai",
    "Looped Thai": "thai",
    "Sans Khmer": "khmer",
    "Serif Khmer": "khmer",
    "Sans Myanmar": "myanmar",
    "Serif Myanmar": "myanmar",
    "Sans Ethiopic": "ethiopic",
    "Serif Ethiopic": "ethiopic",
}

_SERIF = {
    "PT Serif": _family("fonts-paratype", "PTF55F PTF56F PTF75F PTF76F", _ROMAN_CYRILLIC),
    "Charis SIL": _family(
        "fonts-sil-charis",
        "CharisSIL-Regular CharisSIL-Bold CharisSIL-Italic CharisSIL-BoldItalic",
        _ROMAN_CYRILLIC,
    ),
    # Its digits 0 and 1 look like a small o and I.
    "Vollkorn": _family(
        "fonts-vollkorn",
        "Vollkorn-Regular Vollkorn-Medium Vollkorn-Bold Vollkorn-Italic",
        _EUROPEAN,
        unclear="01",
    ),
    "Old Standard": _family(
        "fonts-oldstandard",
        "OldStandard-Regular OldStandard-Bold OldStandard-Italic",
        _EUROPEAN,
    ),
    "CMU Serif": _family("fonts-cmu", "cmunrm cmunbx cmunti cmunbi", _EUROPEAN),
    "GFS Artemisia": _family(
        "fonts-gfs-artemisia",
        "GFSArtemisia GFSArtemisiaBold GFSArtemisiaIt",
        _ROMAN_GREEK,
        ".otf",
        unclear="€",
    ),
    "Cardo": _family("fonts-cardo", "Cardo104s Cardob101 Cardoi99", _ROMAN_GREEK),
    "Averia Serif": _family(
        "fonts-averia-serif-gwf",
        "AveriaSerifGWF-Regular AveriaSerifGWF-Bold AveriaSerifGWF-Italic",
        _WESTERN,
    ),
}

_SANS = {
    "PT Sans": _family("fonts-paratype", "PTS55F PTS56F PTS75F PTS76F", _ROMAN_CYRILLIC),
    "Andika": _family(
        "fonts-sil-andika", "Andika-Regular Andika-Bold Andika-Italic", _ROMAN_CYRILLIC
    ),
    "CMU Sans Serif": _family("fonts-cmu", "cmunss cmunsx cmunsi", _EUROPEAN),
    "GFS Neohellenic": _family(
        "fonts-gfs-neohellenic",
        "GFSNeohellenic GFSNeohellenicBold GFSNeohellenicIt",
        _ROMAN_GREEK,
        ".otf",
    ),
    "Comfortaa": _family("fonts-comfortaa", "Comfortaa-Regular Comfortaa-Bold", _EUROPEAN),
    "Play": _family("fonts-play", "Play-Regular Play-Bold", _EUROPEAN),
    "Inter": _family(
        "fonts-inter", "Inter-Regular Inter-Medium Inter-Bold Inter-Italic", _EUROPEAN, ".otf"
    ),
    "Manrope": _family("fonts-manrope", "Manrope-Regular Manrope-Medium Manrope-Bold", _EUROPEAN),
    "Clear Sans": _family(
        "fonts-clear-sans", "ClearSans-Regular ClearSans-Bold ClearSans-Italic", _EUROPEAN
    ),
    "Go": _family("fonts-go", "Go-Regular Go-Medium Go-Bold Go-Italic", _EUROPEAN),
    "Tuffy": _family("fonts-tuffy", "Tuffy Tuffy_Bold Tuffy_Italic", _EUROPEAN),
    "Quicksand": _family("fonts-quicksand", "Quicksand-Medium Quicksand-Bold", _WESTERN),
    "Jura": _family("fonts-jura", "Jura-Medium Jura-Bold", _EUROPEAN, ".otf"),
}

# Unshaped: some have ligatures for programs, which draw "!=" as one sign.
_MONO = {
    "PT Mono": _family("fonts-paratype", "PTM55F PTM75F", _ROMAN_CYRILLIC, is_shaped=False),
    "CMU Typewriter": _family("fonts-cmu", "cmuntt cmuntb cmunit", _EUROPEAN, is_shaped=False),
    "Go Mono": _family("fonts-go", "Go-Mono Go-Mono-Bold", _EUROPEAN, is_shaped=False),
    "JetBrains Mono": _family(
        "fonts-jetbrains-mono",
        "JetBrainsMono-Regular JetBrainsMono-Bold JetBrainsMono-Italic",
        _EUROPEAN,
        is_shaped=False,
    ),
    "Anonymous Pro": _family(
        "fonts-anonymous-pro",
        "Anonymous~Pro Anonymous~Pro~B Anonymous~Pro~I",
        _EUROPEAN,
        is_shaped=False,
    ),
    "Monofur": _family("fonts-monofur", "monof55 monof56", _EUROPEAN, is_shaped=False),
}

_HANDWRITTEN = {
    "Comic Neue": _family(
        "fonts-comic-neue",
        "ComicNeue-Regular ComicNeue-Bold ComicNeue-Italic",
        _WESTERN,
        ".otf",
    ),
    "Rufscript": _family("fonts-rufscript", "Rufscript010", _ASCII, min_size=16),
    "Kaushan Script": _family(
        "fonts-kaushanscript", "KaushanScript-Regular", _WESTERN, ".otf", min_size=16
    ),
    # Its comma looks like a full stop.
    "Dancing Script": _family(
        "fonts-dancingscript",
        "DancingScript-Regular DancingScript-Bold",
        _ASCII,
        ".otf",
        unclear=",",
        min_size=18,
    ),
    "Lemonada": _family(
        "fonts-lemonada",
        "Lemonada-Regular Lemonada-Bold",
        (*_WESTERN, "arabic"),
        ".otf",
        min_size=12,
    ),
    "Yusei Magic": _family(
        "fonts-yusei-magic", "YuseiMagic-Regular", (*_ASCII, "japanese"), unclear="';\""
    ),
    "Because We Had To": _family(
        "fonts-bwht",
        "BecauseWeBuild-Regular BecauseWeConnect-Regular BecauseWeLearn-Regular"
        " BecauseWeMentor-Regular BecauseWeOrganize-Regular",
        _ASCII,
        ".otf",
        has_capitals_only=True,
        min_size=22,
    ),
    "Toms Talks": _family(
        "fonts-tomsontalks", "TomsonTalks", _ASCII, has_capitals_only=True, min_size=14
    ),
}

_OTHER_SCRIPTS = {
    "Amiri": _family("fonts-hosny-amiri", "Amiri-Regular Amiri-Bold", ("arabic",)),
    "Thabit": _family("fonts-hosny-thabit", "Thabit Thabit-Bold", ("arabic",)),
    "Harmattan": _family("fonts-sil-harmattan", "Harmattan-Regular Harmattan-Bold", ("arabic",)),
    "Nanum Gothic": _family("fonts-nanum", "NanumGothic NanumGothicBold", ("hangul",)),
    "Nanum Barun Gothic": _family(
        "fonts-nanum", "NanumBarunGothic NanumBarunGothicBold", ("hangul",)
    ),
    "Nanum Myeongjo": _family("fonts-nanum", "NanumMyeongjo NanumMyeongjoBold", ("hangul",)),
    "Nanum Square": _family(
        "fonts-nanum", "NanumSquareR NanumSquareB NanumSquareRoundR", ("hangul",)
    ),
    "IPA Gothic": _family("fonts-ipafont-gothic", "ipag ipagp", ("japanese",)),
    "WenQuanYi Micro Hei": _family("fonts-wqy-microhei", "wqy-microhei", ("han",), ".ttc#0"),
    "Noto Sans CJK JP": _cjk("Sans", 0, ("japanese",)),
    "Noto Serif CJK JP": _cjk("Serif", 0, ("japanese",)),
    "Noto Sans CJK KR": _cjk("Sans", 1, ("hangul",)),
    "Noto Serif CJK KR": _cjk("Serif", 1, ("hangul",)),
    "Noto Sans CJK SC": _cjk("Sans", 2, ("han",)),
    "Noto Serif CJK SC": _cjk("Serif", 2, ("han",)),
    "Noto Sans CJK TC": _cjk("Sans", 3, ("han",)),
    "Noto Serif CJK TC": _cjk("Serif", 3, ("han",)),
}

MORE_FAMILIES: dict[str, FontFamily] = {
    **_SERIF,
    **_SANS,
    **_MONO,
    **_HANDWRITTEN,
    **_OTHER_SCRIPTS,
    **{f"Noto {name}": _noto(name, script) for name, script in _NOTO_SCRIPTS.items()},
}
