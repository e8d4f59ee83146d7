"""Icons of the dataset named-pictures: SVG or WebP by style and object name, as RGBA.

names.tsv lists 853 objects with the name of their icon in each style; `basic` are 719 with names of
at most two words. Styles that are held out must not be trained on, nor tuned to. (Names: Unicode
CLDR. Styles: the packages @iconify-json/STYLE and @lobehub/fluent-emoji-3d.)

`render_icon` draws; `icon_raster` draws once on a machine, in a few sizes, for training.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import dataset_folder
from qwen2vl.fetch.store import ROOT_VARIABLE
from qwen2vl.synth.compositing.icon_cache import IconCache
from qwen2vl.synth.compositing.layers import Lines, Tone

__all__ = [
    "DATASET",
    "HELD_OUT_STYLES",
    "LINE_STYLES",
    "TRAINING_STYLES",
    "IconName",
    "change_tone",
    "check_icons",
    "icon_names",
    "icon_raster",
    "load_drawings",
    "render_icon",
    "training_styles",
]

DATASET = "named-pictures"
TRAINING_STYLES = (
    *("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji-3d"),
    *("fluent-emoji-high-contrast", "fxemoji"),
)
HELD_OUT_STYLES = ("openmoji", "emojione", "emojione-v1", "streamline-emojis")
LINE_STYLES = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fxemoji")  # SVG in colors

_LINE_WIDTH = 0.022  # of the icon's width
_UNCHANGED: Tone = (0, 100, 100)
_LUMA = (0.299, 0.587, 0.114)
_REDUCED_FROM = 128  # pixels of the raster from which smaller ones are reduced
_CACHE_VERSION = 1  # to be increased whenever icons are drawn in another way

_COLUMN_OF = {"fluent-emoji-3d": "fluent-3d-webp"}  # where it differs from the style
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{side}" height="{side}" viewBox="{x} {y} {width} {height}">{body}</svg>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class IconName:
    """One object of names.tsv."""

    name: str  # "snow-capped mountain"
    group: str  # "travel & places"
    emoji: str  # its character, by which CLDR names it in other languages
    is_basic: bool
    icons: Mapping[str, str]  # style -> name of the icon; without styles that do not draw it


@cache
def icon_names() -> Mapping[str, IconName]:
    """Read names.tsv: object name -> its row, in the order of the file."""
    path = files("qwen2vl.synth").joinpath("compositing", "names.tsv")
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t")
    return {row["name"]: _parse_row(row) for row in rows}


@cache
def load_drawings() -> Mapping[str, Any]:
    """Load drawings.json: what is known about the drawings of the training styles.

    wrong: style -> name -> why the icon does not show what the name says. colored: names that a
    drawing without its colors does not show. no_article: names that "a" does not suit. categories:
    what a name is, unambiguously -> names.
    """
    path = files("qwen2vl.synth").joinpath("compositing", "drawings.json")
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def training_styles(name: str) -> tuple[str, ...]:
    """Return the training styles that draw what the name says, in the order of TRAINING_STYLES."""
    wrong = load_drawings()["wrong"]
    icons = icon_names()[name].icons
    return tuple(s for s in TRAINING_STYLES if s in icons and name not in wrong.get(s, ()))


def check_icons() -> None:
    """Check that icons can be drawn.

    Raises:
        DatasetNotFoundError: the dataset is not on this machine.
        ConfigError: resvg-py is not installed.
    """
    dataset_folder(DATASET)
    if find_spec("resvg_py") is None:
        raise ConfigError("icons are SVG, which resvg-py draws: pip install 'qwen2vl[synth]'")


@lru_cache(maxsize=256)  # at most 50 MB at 224 pixels
def render_icon(style: str, name: str, side: int, lines: Lines = "") -> Image.Image:
    """Draw an icon with transparency, `side` x `side` pixels.

    Args:
        style: one of TRAINING_STYLES and HELD_OUT_STYLES.
        name: of the object, as in names.tsv.
        side: pixels.
        lines: that are added, only to LINE_STYLES.

    Raises:
        DatasetNotFoundError, ConfigError: as `check_icons` does.
    """
    assert not lines or style in LINE_STYLES, f"lines cannot be added to {style}"
    icon = icon_names()[name].icons[style]
    if style == "fluent-emoji-3d":
        with Image.open(_webp_files(dataset_folder(DATASET) / style)[_code(icon)]) as image:
            return image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    check_icons()
    import resvg_py  # an optional dependency

    svg = _read_svg(style, icon, side, lines)
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def icon_raster(style: str, name: str, side: int, lines: Lines = "") -> Image.Image:
    """Return what `render_icon` draws, as read-only RGBa (premultiplied), from a cache on disk.

    The cache is a file beside the dataset's folder, which may be deleted. All icons of the training
    styles, plain and with lines, are 60 MB at 128 pixels and up to 300 MB in the sizes that the
    task families use.

    Raises:
        DatasetNotFoundError, ConfigError: as `check_icons` does.
    """
    cached = _open_cache(os.environ.get(ROOT_VARIABLE))
    key = f"{style}/{name}/{side}/{lines}"
    pixels = cached.load(key)
    if pixels is None or len(pixels) != 4 * side**2:
        if side < _REDUCED_FROM:  # faster than to draw it anew
            large = icon_raster(style, name, _REDUCED_FROM, lines)
            pixels = large.resize((side, side), Image.Resampling.LANCZOS).tobytes()
        else:
            pixels = render_icon.__wrapped__(style, name, side, lines).convert("RGBa").tobytes()
        cached.store(key, pixels)
    return Image.frombuffer("RGBa", (side, side), pixels, "raw", "RGBa", 0, 1)


def change_tone(icon: Image.Image, tone: Tone) -> Image.Image:
    """Turn the hues of an RGBA picture by `tone`, and scale its saturation and its brightness."""
    if tone == _UNCHANGED:
        return icon
    hue, saturation, brightness = math.radians(tone[0]), tone[1] / 100, tone[2] / 100
    cosine, sine = saturation * math.cos(hue), saturation * math.sin(hue) / math.sqrt(3)
    matrix: list[float] = []
    for row in range(3):
        for column in range(3):
            # Colors are turned about the axis of grays, which stays what it is.
            turned = cosine * ((row == column) - 1 / 3)
            turned += sine * (0, -1, 1)[(column - row) % 3]
            gray = saturation / 3 + (1 - saturation) * _LUMA[column]
            matrix.append(brightness * (gray + turned))
        matrix.append(0)
    turned_rgb = icon.convert("RGB").convert("RGB", tuple(matrix))
    turned_rgb.putalpha(icon.getchannel("A"))
    return turned_rgb


@cache  # dataset_folder takes longer than to read an icon
def _open_cache(_root: str | None) -> IconCache:
    folder = dataset_folder(DATASET)
    try:
        resvg = version("resvg_py")
    except PackageNotFoundError:
        resvg = "none"
    return IconCache(folder.parent / f".{folder.name}.icons-{resvg}-{_CACHE_VERSION}.sqlite")


def _read_svg(style: str, icon: str, side: int, lines: Lines) -> str:
    icons = _read_style(dataset_folder(DATASET), style)
    name = icons.get("aliases", {}).get(icon, {}).get("parent", icon)
    found = icons["icons"][name]
    width, height = (found.get(key, icons.get(key, 16)) for key in ("width", "height"))
    body, margin = found["body"], 0.0
    if lines:
        stroke = _LINE_WIDTH * width
        margin = stroke / 2  # of the lines around parts that touch the border
        body = f'<g stroke="#000" stroke-width="{stroke}" stroke-linejoin="round">{body}</g>'
    if lines == "line_art":
        body = re.sub(r'fill="(?!none)[^"]*"', 'fill="#fff"', body).replace(
            "<g", '<g fill="#fff"', 1
        )
    return _SVG.format(
        side=side,
        x=-margin,
        y=-margin,
        width=width + 2 * margin,
        height=height + 2 * margin,
        body=body,
    )


@cache
def _webp_files(folder: Path) -> Mapping[str, Path]:
    return {_code(path.stem): path for path in folder.glob("*.webp")}


def _code(stem: str) -> str:
    """Remove the variation selectors, which not all lists of emoji have: "1f54a-fe0f"."""
    return stem.replace("-fe0f", "")


@cache
def _read_style(folder: Path, style: str) -> dict[str, Any]:
    return json.loads((folder / style / "icons.json").read_text(encoding="utf-8"))


def _parse_row(row: Mapping[str, str]) -> IconName:
    styles = (*TRAINING_STYLES, *HELD_OUT_STYLES)
    icons = {style: row[_COLUMN_OF.get(style, style)] for style in styles}
    return IconName(
        name=row["name"],
        group=row["group"],
        emoji="".join(chr(int(code, 16)) for code in row["hex"].split("-")),
        is_basic=row["basic"] == "1",
        icons={style: icon for style, icon in icons.items() if icon},
    )
