"""The list of named icons, and their rendering in every style."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.compositing import icon_names, icons
from qwen2vl.synth.compositing.icons import (
    HELD_OUT_STYLES,
    TRAINING_STYLES,
    check_icons,
    render_icon,
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
    monkeypatch.setattr(icons, "dataset_folder", lambda name: tmp_path)
    render_icon.cache_clear()
    yield tmp_path
    render_icon.cache_clear()


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


def test_a_missing_dataset_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    render_icon.cache_clear()
    for function in (check_icons, lambda: render_icon("noto", "guitar", 17)):
        with pytest.raises(DatasetNotFoundError, match="qwen2vl fetch-data named-pictures"):
            function()


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    for function in (check_icons, lambda: render_icon("noto", "guitar", 17)):
        with pytest.raises(ConfigError, match=r"resvg-py.*pip install 'qwen2vl\[synth\]'"):
            function()
