"""The list of named icons, and their rendering in every style."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.compositing import icon_names, icons
from qwen2vl.synth.compositing.icons import (
    HELD_OUT_STYLES,
    LINE_STYLES,
    TRAINING_STYLES,
    change_tone,
    check_icons,
    icon_raster,
    load_drawings,
    render_icon,
    training_styles,
)
from tests.requirements import needs_dataset

STYLES = (*TRAINING_STYLES, *HELD_OUT_STYLES)


def count_basic(style: str) -> int:
    return sum(style in name.icons for name in icon_names().values() if name.is_basic)


def test_the_list_has_853_objects_of_which_719_are_basic() -> None:
    names = icon_names()
    assert len(names) == 853 and all(key == name.name for key, name in names.items())
    basic = [name for name in names.values() if name.is_basic]
    assert len(basic) == 719
    assert all(len(name.name.split()) <= 2 for name in basic)
    assert len({name.emoji for name in names.values()}) == 853
    assert names["snow-capped mountain"].emoji == "\U0001f3d4" and not names["guitar"].emoji[1:]


def test_held_out_styles_are_no_training_styles() -> None:
    assert len(set(STYLES)) == len(STYLES) == 11
    counts = {style: count_basic(style) for style in HELD_OUT_STYLES}
    assert counts == {
        "openmoji": 719,
        "emojione": 526,
        "emojione-v1": 448,
        "streamline-emojis": 231,
    }
    assert Counter(style for name in icon_names().values() for style in name.icons).keys() == set(
        STYLES
    )


@needs_dataset("named-pictures")
@pytest.mark.parametrize("style", STYLES)
def test_icons_of_a_style_are_drawn(style: str) -> None:
    pytest.importorskip("resvg_py")
    drawn = [name.name for name in icon_names().values() if style in name.icons and name.is_basic]
    for name in Random(style).sample(drawn, 100):
        icon = render_icon(style, name, 32)
        assert icon.size == (32, 32) and icon.mode == "RGBA"
        assert np.count_nonzero(np.asarray(icon)[..., 3]) > 20, name


@needs_dataset("named-pictures")
def test_every_icon_of_the_style_of_bitmaps_has_a_file() -> None:
    """Names of files have a variation selector that the list lacks: "1f54a-fe0f.webp"."""
    style = "fluent-emoji-3d"
    for name in ("dove", "spider web", "airplane", "guitar"):
        assert render_icon(style, name, 16).getbbox()
    files = icons._webp_files(icons.dataset_folder(icons.DATASET) / style)
    for name in icon_names().values():
        if style in name.icons:
            assert icons._code(name.icons[style]) in files, name.name


def write_style(root: Path, style: str, content: dict[str, object]) -> None:
    (root / style).mkdir(parents=True)
    (root / style / "icons.json").write_text(json.dumps(content), encoding="utf-8")


def square(rgb: str) -> dict[str, object]:
    return {"body": f'<path fill="{rgb}" d="M0 0h10v10H0z"/>'}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A dataset of which a test writes the styles."""
    monkeypatch.setattr(icons, "dataset_folder", lambda name: tmp_path / "dataset")
    caches = (render_icon, icons._open_cache, icons._read_style)
    for function in caches:
        function.cache_clear()
    yield tmp_path / "dataset"
    for function in caches:
        function.cache_clear()


def test_an_alias_is_drawn_as_its_parent(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    write_style(
        folder,
        "noto",
        {
            "width": 10,
            "height": 10,
            "icons": {"cat": square("#f00"), "dog": square("#00f")},
            "aliases": {"monkey": {"parent": "dog"}},
        },
    )
    assert render_icon("noto", "cat", 9).getpixel((4, 4)) == (255, 0, 0, 255)
    assert render_icon("noto", "monkey", 9).getpixel((4, 4)) == (0, 0, 255, 255)


def test_an_icon_that_is_not_square_keeps_its_aspect_ratio(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    style = {"width": 10, "height": 10, "icons": {"cat": {**square("#f00"), "width": 20}}}
    write_style(folder, "noto", style)
    icon = render_icon("noto", "cat", 40)
    assert icon.size == (40, 40) and icon.getbbox() == (0, 10, 20, 30)


def test_a_raster_is_drawn_once_and_premultiplied(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    half = {"body": '<path fill="#f00" fill-opacity=".5" d="M0 0h10v10H0z"/>'}
    write_style(folder, "noto", {"width": 10, "height": 10, "icons": {"cat": half}})
    drawn = render_icon("noto", "cat", 128).convert("RGBa")
    assert icon_raster("noto", "cat", 128).tobytes() == drawn.tobytes()
    assert drawn.tobytes()[:4] == bytes((128, 0, 0, 128))
    small = icon_raster("noto", "cat", 20)
    assert small.size == (20, 20) and small.mode == "RGBa"
    shutil.rmtree(folder)
    for function in (icons._open_cache, icons._read_style):
        function.cache_clear()
    assert icon_raster("noto", "cat", 20).tobytes() == small.tobytes()
    assert icon_raster("noto", "cat", 128).tobytes() == drawn.tobytes()


def test_lines_are_added_around_the_parts(folder: Path) -> None:
    pytest.importorskip("resvg_py")
    body = '<path fill="#f00" d="M20 20h60v60H20z"/><path fill="none" d="M0 0h100v100H0z"/>'
    write_style(folder, "noto", {"width": 100, "height": 100, "icons": {"cat": {"body": body}}})
    inside, border = (50, 50), (20, 50)
    plain, outlined, lines = (
        render_icon("noto", "cat", 100, kind) for kind in ("", "outlines", "line_art")
    )
    assert pixel(plain, inside) == pixel(plain, (21, 50)) == (255, 0, 0, 255)
    assert pixel(outlined, inside) == (255, 0, 0, 255)
    assert pixel(lines, inside) == (255, 255, 255, 255)
    for drawn in (outlined, lines):
        assert pixel(drawn, border) == (0, 0, 0, 255)
        assert not drawn.crop((5, 5, 15, 15)).getbbox(), "what is not filled stays so"
        assert pixel(drawn, (0, 50))[3] > 200, "lines at the border are inside of the icon"


@needs_dataset("named-pictures")
@pytest.mark.parametrize("style", LINE_STYLES)
def test_all_styles_with_colors_can_be_outlined(style: str) -> None:
    pytest.importorskip("resvg_py")
    plain, outlined = render_icon(style, "pencil", 64), render_icon(style, "pencil", 64, "outlines")
    black = [
        np.asarray(i)[..., :3].max(axis=2)[np.asarray(i)[..., 3] > 200] for i in (plain, outlined)
    ]
    assert (black[1] < 20).mean() > (black[0] < 20).mean() + 0.05


def test_styles_without_colored_parts_cannot_be_outlined() -> None:
    with pytest.raises(AssertionError, match="lines cannot be added to fluent-emoji-3d"):
        render_icon("fluent-emoji-3d", "guitar", 20, "outlines")


def test_tone_turns_hues_and_keeps_grays_and_transparency() -> None:
    pixels = [(200, 40, 40, 255), (90, 90, 90, 255), (10, 20, 200, 7)]
    icon = Image.new("RGBA", (3, 1))
    icon.putdata(pixels)
    assert change_tone(icon, (0, 100, 100)) is icon
    green = change_tone(icon, (120, 100, 100))
    assert close(pixel(green, (0, 0)), (40, 200, 40, 255))
    assert close(pixel(green, (1, 0)), (90, 90, 90, 255)) and pixel(green, (2, 0))[3] == 7
    gray = change_tone(icon, (0, 0, 100))
    assert close(pixel(gray, (0, 0)), (88, 88, 88, 255))  # 0.299 R + 0.587 G + 0.114 B
    assert close(pixel(change_tone(icon, (0, 100, 50)), (0, 0)), (100, 20, 20, 255))


def pixel(image: Image.Image, at: tuple[int, int]) -> tuple[int, ...]:
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return value


def close(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 1 for a, b in zip(got, wanted, strict=True))


def test_wrong_drawings_are_left_out_of_training() -> None:
    assert training_styles("guitar") == TRAINING_STYLES
    assert "fxemoji" in icon_names()["keyboard"].icons and "fxemoji" not in training_styles(
        "keyboard"
    )
    assert all(training_styles(name) for name in icon_names())
    assert not {style for name in icon_names() for style in training_styles(name)} & set(
        HELD_OUT_STYLES
    )


def test_what_is_known_about_drawings_is_about_names_of_the_list() -> None:
    names, drawings = icon_names(), load_drawings()
    for style, wrong in drawings["wrong"].items():
        assert style in TRAINING_STYLES and all(style in names[name].icons for name in wrong)
    assert set(drawings["colored"]) | set(drawings["no_article"]) <= names.keys()
    listed = [name for listed in drawings["categories"].values() for name in listed]
    assert len(listed) == len(set(listed)) > 300 and set(listed) <= names.keys()


def test_a_missing_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    render_icon.cache_clear()
    for function in (
        check_icons,
        lambda: render_icon("noto", "guitar", 17),
        lambda: icon_raster("noto", "guitar", 17),
    ):
        with pytest.raises(DatasetNotFoundError, match="qwen2vl fetch-data named-pictures"):
            function()


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    for function in (check_icons, lambda: render_icon("noto", "guitar", 17)):
        with pytest.raises(ConfigError, match=r"resvg-py.*pip install 'qwen2vl\[synth\]'"):
            function()
