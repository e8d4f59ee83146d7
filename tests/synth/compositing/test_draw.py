"""Drawing of composites: grounds, layers in order and partly outside, compression, sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.compositing import (
    Composite,
    Ground,
    Icon,
    Photo,
    Rect,
    ShapeLayer,
    Text,
    check_resources,
    draw_composite,
)
from qwen2vl.synth.compositing.draw import photo
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.fonts import FontError
from tests.requirements import needs_dataset

RED, BLUE, GRAY = (255, 0, 0), (0, 0, 255), (90, 100, 110)
SCENE = Composite(
    width=60,
    height=40,
    ground=Ground(rgb=GRAY),
    layers=(
        ShapeLayer(kind="circle", rgb=RED, box=(4, 4, 34, 34)),
        Text(text="Tea", font="Caladea-Bold.ttf", size=18, x=30, y=30, rgb=BLUE),
    ),
)


def ground(kind: str, width: int = 30, height: int = 20, **fields: object) -> NDArray[np.uint8]:
    return draw_composite(
        Composite(width=width, height=height, ground=Ground(kind=kind, **fields))  # type: ignore[arg-type]
    )


def test_a_plain_ground_has_exactly_its_color() -> None:
    assert (ground("plain", rgb=GRAY) == GRAY).all()


def test_a_gradient_ends_in_its_two_colors() -> None:
    pixels = ground("gradient", rgb=RED, rgb2=BLUE)
    assert (pixels[:, 0] == RED).all() and (pixels[:, -1] == BLUE).all()
    assert (np.diff(pixels[0, :, 2].astype(int)) >= 0).all()
    pixels = ground("gradient", rgb=RED, rgb2=BLUE, seed=1)
    assert (pixels[0] == RED).all() and (pixels[-1] == BLUE).all()


def test_noise_is_seeded_in_cells_and_between_its_colors() -> None:
    low, high = (10, 100, 50), (30, 90, 250)
    pixels = ground("noise", rgb=low, rgb2=high, cell=7, seed=3)
    assert (pixels >= np.minimum(low, high)).all() and (pixels <= np.maximum(low, high)).all()
    assert (pixels[:7, :7] == pixels[0, 0]).all() and (pixels[14:, 28:] == pixels[-1, -1]).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 3 * 5
    assert (pixels == ground("noise", rgb=low, rgb2=high, cell=7, seed=3)).all()
    assert (pixels != ground("noise", rgb=low, rgb2=high, cell=7, seed=4)).any()


def test_stripes_and_checks_alternate() -> None:
    stripes = ground("stripes", rgb=RED, rgb2=BLUE, cell=5)
    assert (stripes[:5] == RED).all() and (stripes[5:10] == BLUE).all()
    assert (stripes[10:15] == RED).all()
    checks = ground("checks", rgb=RED, rgb2=BLUE, cell=5)
    assert (checks[:5, :5] == RED).all() and (checks[:5, 5:10] == BLUE).all()
    assert (checks[5:10, :5] == BLUE).all() and (checks[5:10, 5:10] == RED).all()


def test_clouds_are_smooth_seeded_and_between_their_colors() -> None:
    fields = {"rgb": (10, 100, 50), "rgb2": (210, 90, 250), "cell": 4}
    pixels = ground("clouds", 120, 90, seed=3, **fields).astype(int)
    assert (pixels >= (10, 90, 50)).all() and (pixels <= (210, 100, 250)).all()
    assert np.ptp(pixels[..., 0]) > 100
    # A spot is about twelve pixels wide.
    assert np.abs(np.diff(pixels[..., 0], axis=1)).max() < 60
    assert (pixels == ground("clouds", 120, 90, seed=3, **fields)).all()
    assert (pixels != ground("clouds", 120, 90, seed=4, **fields)).any()
    enlarged = ground("clouds", 240, 180, seed=3, **{**fields, "cell": 8}).astype(int)
    assert np.abs(enlarged[::2, ::2] - pixels).mean() < 6


@pytest.mark.parametrize("cell", [1, 3])
def test_noise_that_is_drawn_in_parts_is_one_sequence(cell: int) -> None:
    width, height = 31, 200
    pixels = ground("noise", width, height, cell=cell, seed=9, rgb=(0, 20, 40), rgb2=(250, 9, 99))
    size = (-(-height // cell), -(-width // cell), 3)
    shares = np.random.Generator(np.random.Philox(9)).random(size, dtype=np.float32)
    low, high = np.array((0, 20, 40), np.float32), np.array((250, 9, 99), np.float32)
    expected = (low + (high - low) * shares).round().astype(np.uint8)
    expected = expected.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    assert (pixels == expected).all()


@pytest.mark.parametrize("kind", ["noise", "stripes", "checks"])
def test_a_scaled_ground_is_the_same_with_larger_pixels(kind: str) -> None:
    picture = Composite(width=23, height=17, ground=Ground(kind=kind, cell=3, seed=5))  # type: ignore[arg-type]
    enlarged = draw_composite(picture).repeat(2, 0).repeat(2, 1)
    assert (draw_composite(picture.scaled(2)) == enlarged).all()


@pytest.mark.parametrize("kind", ["circle", "star", "triangle"])
def test_a_shape_fills_its_box_and_nothing_else(kind: str) -> None:
    layer = ShapeLayer(kind=kind, rgb=RED, box=(7, 5, 36, 34))
    pixels = draw_composite(Composite(width=50, height=40, layers=(layer,)))
    rows, columns = np.nonzero((pixels != 255).any(axis=-1))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == layer.box


def test_a_shape_may_be_flat_and_rotated_within_its_box() -> None:
    layer = ShapeLayer(kind="rectangle", rgb=RED, box=(7, 5, 47, 25))
    pixels = draw_composite(Composite(width=60, height=40, layers=(layer,)))
    assert (pixels[5:25, 7:47] == RED).all() and (pixels[25:] == 255).all()
    turned = replace(layer, angle=90)
    pixels = draw_composite(Composite(width=60, height=40, layers=(turned,)))
    rows, columns = np.nonzero((pixels != 255).any(axis=-1))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert max(abs(a - b) for a, b in zip(found, (22, 5, 32, 25), strict=True)) <= 1


def test_a_rect_is_filled_and_cut_off_at_the_border() -> None:
    layer = Rect(rgb=BLUE, box=(-5, 30, 20, 60))
    pixels = draw_composite(Composite(width=60, height=40, layers=(layer,)))
    assert (pixels[30:, :20] == BLUE).all()
    assert (pixels[:30] == 255).all() and (pixels[:, 20:] == 255).all()


def test_layers_are_painted_in_their_order() -> None:
    box = (5, 5, 25, 25)
    red, blue = (ShapeLayer(kind="square", rgb=rgb, box=box) for rgb in (RED, BLUE))
    for layers in ((red, blue), (blue, red)):
        pixels = draw_composite(Composite(width=30, height=30, layers=layers))
        assert (pixels[5:25, 5:25] == layers[1].rgb).all()


@pytest.mark.parametrize("offset", [(-20, -15), (40, 25), (-200, 0), (0, 400)])
def test_what_is_outside_of_the_picture_is_cut_off(offset: tuple[int, int]) -> None:
    x, y = offset
    shape = ShapeLayer(kind="star", rgb=RED, box=(x, y, x + 40, y + 40))
    text = Text(text="Way out", font="Cabin-Regular.otf", size=30, x=x, y=y + 20, rgb=BLUE)
    cropped = draw_composite(Composite(width=60, height=40, layers=(shape, text)))
    moved = (
        replace(shape, box=(x + 500, y + 500, x + 540, y + 540)),
        replace(text, x=x + 500, y=y + 520),
    )
    whole = draw_composite(Composite(width=1100, height=1100, layers=moved))
    assert (cropped == whole[500:540, 500:560]).all()


def test_blur_and_compression_change_pixels_but_not_the_size() -> None:
    plain = draw_composite(SCENE)
    blurred = draw_composite(replace(SCENE, blur=1.5))
    best, worst = (draw_composite(replace(SCENE, jpeg_quality=q)) for q in (95, 5))
    for changed in (blurred, best, worst):
        assert changed.shape == plain.shape == (40, 60, 3) and changed.dtype == np.uint8
    difference = [np.abs(p.astype(int) - plain).mean() for p in (best, worst)]
    assert 0 < difference[0] < difference[1] < 40
    edges = [np.abs(np.diff(p.astype(int), axis=1)).max() for p in (plain, blurred)]
    assert edges[1] < edges[0] / 2


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2000, 64), (1, 300), (64, 64)])
@pytest.mark.parametrize("kind", ["plain", "gradient", "noise", "stripes", "checks", "clouds"])
def test_pictures_of_any_size(width: int, height: int, kind: str) -> None:
    picture = Composite(
        width=width,
        height=height,
        ground=Ground(kind=kind, cell=9, rgb=RED),  # type: ignore[arg-type]
        layers=SCENE.layers,
        blur=0.7,
        jpeg_quality=80,
    )
    pixels = draw_image(picture)
    assert pixels.shape == (height, width, 3) and pixels.flags["C_CONTIGUOUS"]
    assert pixels.flags["WRITEABLE"] and (pixels == draw_image(picture)).all()


def test_absent_resources_are_found_before_drawing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    check_resources([SCENE, Composite(width=3, height=3)])
    absent = {
        "fetch-data named-pictures": Icon(style="noto", name="guitar", box=(0, 0, 9, 9)),
        "fetch-data photos": Photo(file="chelsea.png", box=(0, 0, 9, 9)),
        "fetch-data test-fonts": replace(SCENE.layers[1], font="culmus/A.ttf"),
    }
    for command, layer in absent.items():
        with pytest.raises(DatasetNotFoundError, match=command):
            check_resources([SCENE, Composite(width=3, height=3, layers=(layer,))])
    unknown = Composite(width=3, height=3, layers=(replace(SCENE.layers[1], font="No.ttf"),))
    with pytest.raises(FontError, match=r"No\.ttf"):
        check_resources([unknown])


@needs_dataset("photos")
def test_a_photo_is_cropped_and_resized_to_its_box() -> None:
    original = np.asarray(photo("chelsea.png"))
    layer = Photo(file="chelsea.png", crop=(50, 60, 90, 110), box=(5, 10, 45, 60))
    pixels = draw_composite(Composite(width=70, height=80, layers=(layer,)))
    assert (pixels[10:60, 5:45] == original[60:110, 50:90]).all()
    outside = np.ones((80, 70), dtype=bool)
    outside[10:60, 5:45] = False
    assert (pixels[outside] == 255).all()
    height, width = original.shape[:2]
    whole = Composite(
        width=width, height=height, layers=(Photo(file="chelsea.png", box=(0, 0, width, height)),)
    )
    assert (draw_composite(whole) == original).all()
    layer = Photo(file="chelsea.png", box=(-30, -20, width - 30, height - 20))
    outside_left = draw_composite(replace(whole, layers=(layer,)))
    assert (outside_left[:-20, :-30] == original[20:, 30:]).all()


@needs_dataset("named-pictures")
def test_an_icon_is_turned_counterclockwise_and_transparent_around_it() -> None:
    pytest.importorskip("resvg_py")
    box = (10, 5, 74, 69)
    upright, turned = (
        draw_composite(
            Composite(
                width=90,
                height=80,
                ground=Ground(rgb=GRAY),
                layers=(Icon(style="openmoji", name="guitar", box=box, angle=angle),),
            )
        )
        for angle in (0, 90)
    )
    outside = np.ones((80, 90), dtype=bool)
    outside[5:69, 10:74] = False
    assert (upright[outside] == GRAY).all() and (upright[5, 10] == GRAY).all()
    assert (upright[~outside] != GRAY).any()
    assert (turned[5:69, 10:74] == np.rot90(upright[5:69, 10:74])).all()


@needs_dataset("named-pictures")
def test_an_icon_in_a_box_that_is_not_square_fills_it() -> None:
    pytest.importorskip("resvg_py")
    box = (2, 3, 62, 23)
    picture = Composite(
        width=70, height=30, layers=(Icon(style="twemoji", name="full moon", box=box),)
    )
    rows, columns = np.nonzero((draw_composite(picture) < 250).any(axis=-1))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert max(abs(a - b) for a, b in zip(found, box, strict=True)) <= 2


@needs_dataset("named-pictures")
@pytest.mark.parametrize("angle", [0, 15])
@pytest.mark.parametrize("side", [40, 130])
def test_an_icon_that_is_resized_resembles_one_of_its_size(angle: int, side: int) -> None:
    pytest.importorskip("resvg_py")
    icon = Icon(style="twemoji", name="guitar", box=(3, 3, 3 + side, 3 + side), angle=angle)
    exact, resized = (
        draw_composite(Composite(width=side + 6, height=side + 6, layers=(layer,))).astype(int)
        for layer in (icon, replace(icon, raster=80))
    )
    assert 0 < np.abs(exact - resized).mean() < 6
    assert (resized[:3] == 255).all() and (resized[:, :3] == 255).all()
