"""How icons are sampled: names, styles, changes and the background that shows them."""

from __future__ import annotations

from random import Random

import pytest

from qwen2vl.synth.compositing import Composite, Ground, Icon, icon_names
from qwen2vl.synth.compositing.icon_sampling import (
    RASTERS,
    IconLook,
    are_near,
    fit_ground,
    sample_icon_layer,
    sample_look,
    sample_names,
    sample_other_names,
)
from qwen2vl.synth.compositing.icons import LINE_STYLES, TRAINING_STYLES
from qwen2vl.synth.compositing.layers import Lines
from tests.requirements import needs_dataset

BOX = (0, 0, 50, 50)


def test_names_of_one_sample_differ_and_basic_ones_are_frequent() -> None:
    rng = Random(0)
    names = sample_names(rng, 400)
    assert len(set(names)) == 400
    basic = sum(icon_names()[name].is_basic for name in names[:150])
    assert 120 < basic < 150


@pytest.mark.parametrize("num_names", [40, 300])
def test_a_curriculum_takes_its_first_names_only(num_names: int) -> None:
    rng = Random(4)
    seen: set[str] = set()
    for _ in range(200):
        names = sample_names(rng, 16, num_names)
        seen.update(names, sample_other_names(rng, names, 3, num_names))
    assert len(seen) == num_names
    assert all(icon_names()[name].is_basic for name in seen)
    assert len({icon_names()[name].group for name in seen}) >= 5
    larger = {name for _ in range(300) for name in sample_names(rng, 16, num_names + 100)}
    assert seen < larger


def test_other_names_share_no_word_and_are_often_of_the_same_group() -> None:
    rng = Random(1)
    same = 0
    for _ in range(100):
        others = sample_other_names(rng, ["cat face", "guitar"], 3)
        assert len(set(others)) == 3
        assert not any({"cat", "face", "guitar"} & set(other.split()) for other in others)
        groups = {icon_names()[other].group for other in others}
        same += groups in ({"animals & nature"}, {"objects"})
    assert 35 < same < 75
    assert are_near("cat", "black cat") and not are_near("cat", "caterpillar")


def test_only_styles_of_svg_in_colors_get_lines() -> None:
    rng = Random(2)
    looks = [sample_look(rng, "guitar") for _ in range(300)]
    assert {look.style for look in looks} == set(TRAINING_STYLES)
    assert all(look.style in LINE_STYLES for look in looks if look.lines)
    assert {look.lines for look in looks} == {"", "outlines", "line_art"}
    assert any(look.tone[1] == 0 for look in looks)


def test_a_style_that_does_not_draw_a_name_rightly_is_replaced() -> None:
    icon = sample_icon_layer(Random(3), "keyboard", BOX, IconLook(style="fxemoji"))
    assert icon.style != "fxemoji"
    assert sample_icon_layer(Random(3), "guitar", BOX, IconLook(style="fxemoji")).style == "fxemoji"


def test_colored_names_keep_their_colors() -> None:
    kept_lines: dict[Lines, Lines] = {"line_art": "", "outlines": "outlines"}
    for lines, kept in kept_lines.items():
        look = IconLook(style="noto", lines=lines, tone=(20, 0, 100))
        icon = sample_icon_layer(Random(4), "red apple", BOX, look)
        assert icon.tone == (0, 100, 100) and icon.lines == kept
        assert sample_icon_layer(Random(4), "guitar", BOX, look).tone == (20, 0, 100)


@pytest.mark.parametrize(("side", "raster"), [(20, 28), (28, 28), (57, 80), (260, 192), (280, 0)])
def test_icons_are_reduced_from_the_next_raster_and_hardly_enlarged(side: int, raster: int) -> None:
    box = (0, 0, side, side)
    icon = sample_icon_layer(Random(5), "guitar", box, IconLook(style="noto"))
    assert icon.raster == raster and raster in (*RASTERS, 0)


@needs_dataset("named-pictures")
def test_the_background_is_replaced_only_where_an_icon_is_not_visible() -> None:
    pytest.importorskip("resvg_py")
    rng = Random(6)
    black = Composite(width=50, height=50, ground=Ground(rgb=(0, 0, 0)))
    white = Composite(width=50, height=50)
    contrast, noto = IconLook(style="fluent-emoji-high-contrast"), IconLook(style="noto")
    line_art = IconLook(style="noto", lines="line_art")
    assert fit_ground(rng, black, [icon_of(noto), icon_of(contrast)]) != black
    for empty, look in ((white, contrast), (black, noto), (black, line_art), (white, line_art)):
        assert fit_ground(rng, empty, [icon_of(look)]) == empty


def icon_of(look: IconLook) -> Icon:
    return sample_icon_layer(Random(7), "guitar", BOX, look)
