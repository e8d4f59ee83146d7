"""Icons of the dataset named-pictures: SVG or WebP by style and object name, as RGBA.

names.tsv lists 853 objects with the name of their icon in each style; `basic` are 719 with names of
at most two words. Styles that are held out must not be trained on, nor tuned to. (Names: Unicode
CLDR. Styles: the packages @iconify-json/STYLE and @lobehub/fluent-emoji-3d.)
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import dataset_folder

__all__ = [
    "DATASET",
    "HELD_OUT_STYLES",
    "TRAINING_STYLES",
    "IconName",
    "check_icons",
    "icon_names",
    "render_icon",
]

DATASET = "named-pictures"
TRAINING_STYLES = (
    *("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "fluent-emoji-3d"),
    *("fluent-emoji-high-contrast", "fxemoji"),
)
HELD_OUT_STYLES = ("openmoji", "emojione", "emojione-v1", "streamline-emojis")

_COLUMN_OF = {"fluent-emoji-3d": "fluent-3d-webp"}  # where it differs from the style
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{side}" height="{side}" viewBox="0 0 {width} {height}">{body}</svg>'
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


def check_icons() -> None:
    """Check that icons can be drawn.

    Raises:
        DatasetNotFoundError: the dataset is not on this machine.
        ConfigError: resvg-py is not installed.
    """
    dataset_folder(DATASET)
    if find_spec("resvg_py") is None:
        raise ConfigError("icons are SVG, which resvg-py draws: pip install 'qwen2vl[synth]'")


# 4,096 icons of 128 x 128 pixels are 270 MB; training draws the same ones again and again.
@lru_cache(maxsize=4096)
def render_icon(style: str, name: str, side: int) -> Image.Image:
    """Draw an icon with transparency, `side` x `side` pixels.

    Args:
        style: one of TRAINING_STYLES and HELD_OUT_STYLES.
        name: of the object, as in names.tsv.
        side: pixels.

    Raises:
        DatasetNotFoundError, ConfigError: as `check_icons` does.
    """
    icon = icon_names()[name].icons[style]
    if style == "fluent-emoji-3d":
        with Image.open(_webp_files(dataset_folder(DATASET) / style)[_code(icon)]) as image:
            return image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    check_icons()
    import resvg_py  # an optional dependency

    svg = _read_svg(style, icon).replace("SIDE", str(side), 2)
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _read_svg(style: str, icon: str) -> str:
    """Return the SVG of an icon, with SIDE as its width and height."""
    icons = _read_style(dataset_folder(DATASET), style)
    name = icons.get("aliases", {}).get(icon, {}).get("parent", icon)
    found = icons["icons"][name]
    return _SVG.format(
        side="SIDE",
        width=found.get("width", icons.get("width", 16)),
        height=found.get("height", icons.get("height", 16)),
        body=found["body"],
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
