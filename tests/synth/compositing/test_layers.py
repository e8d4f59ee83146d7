"""Data types of composite pictures: JSON round trips, omitted defaults, scaling."""

from __future__ import annotations

import json

import pytest

from qwen2vl.synth.compositing import Composite, Ground, Icon, Photo, Rect, ShapeLayer, Text
from qwen2vl.synth.compositing.layers import Layer
from qwen2vl.synth.spec import picture_from_json, picture_to_json

LAYERS: list[Layer] = [
    Icon(style="noto", name="guitar", box=(1, 2, 33, 34)),
    Icon(style="noto", name="guitar", box=(-4, 2, 28, 34), angle=90),
    ShapeLayer(kind="star", rgb=(1, 2, 3), box=(0, 0, 9, 9)),
    Text(text="naïve שלום", font="Cabin-Bold.otf", size=20, x=3, y=30),
    Text(text="a", font="culmus/ShofarDemi-Bold.ttf", size=9, x=-1, y=0, rgb=(9, 8, 7)),
    Photo(file="chelsea.png", box=(5, 6, 50, 60)),
    Photo(file="chelsea.png", crop=(10, 20, 30, 40), box=(5, 6, 50, 60)),
    Icon(style="noto", name="guitar", box=(1, 2, 33, 34), raster=80),
    ShapeLayer(kind="oval", rgb=(1, 2, 3), box=(0, 0, 9, 5), angle=-30),
    Rect(rgb=(4, 5, 6), box=(1, 1, 8, 3)),
]


def pass_through_json(picture: Composite) -> Composite:
    raw = json.loads(json.dumps(picture_to_json(picture)))
    assert raw["type"] == "composite"
    restored = picture_from_json(raw)
    assert isinstance(restored, Composite)
    return restored


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_survives_json(layer: Layer) -> None:
    picture = Composite(width=64, height=48, layers=(layer,))
    restored = pass_through_json(picture)
    assert restored == picture and hash(restored) == hash(picture)


@pytest.mark.parametrize("kind", ["plain", "gradient", "noise", "stripes", "checks", "clouds"])
def test_a_ground_and_all_layers_survive_json_in_their_order(kind: str) -> None:
    ground = Ground(kind=kind, rgb=(9, 9, 9), rgb2=(5, 5, 5), cell=4, seed=7)  # type: ignore[arg-type]
    picture = Composite(
        width=64, height=48, ground=ground, layers=tuple(LAYERS), blur=0.5, jpeg_quality=70
    )
    assert pass_through_json(picture) == picture
    assert Composite.from_json(json.loads(json.dumps(picture.to_json()))) == picture


def test_defaults_are_omitted() -> None:
    assert Composite(width=3, height=2).to_json() == {"width": 3, "height": 2}
    picture = Composite(
        width=3, height=2, ground=Ground(kind="noise"), layers=(LAYERS[0], LAYERS[5])
    )
    assert picture.to_json() == {
        "width": 3,
        "height": 2,
        "ground": {"kind": "noise"},
        "layers": [
            {"type": "icon", "style": "noto", "name": "guitar", "box": (1, 2, 33, 34)},
            {"type": "photo", "file": "chelsea.png", "box": (5, 6, 50, 60)},
        ],
    }


def test_a_mistyped_field_is_refused() -> None:
    with pytest.raises(TypeError, match="tint"):
        Composite.from_json({"width": 3, "height": 2, "layers": [{"type": "text", "tint": 1}]})


def test_scaled_multiplies_what_is_in_pixels_of_the_picture() -> None:
    picture = Composite(
        width=64,
        height=48,
        ground=Ground(kind="checks", cell=4, seed=3),
        layers=tuple(LAYERS),
        blur=0.5,
        jpeg_quality=70,
    )
    scaled = picture.scaled(3)
    assert (scaled.width, scaled.height, scaled.blur, scaled.jpeg_quality) == (192, 144, 1.5, 70)
    assert scaled.ground == Ground(kind="checks", cell=12, seed=3)
    assert scaled.layers == (
        Icon(style="noto", name="guitar", box=(3, 6, 99, 102)),
        Icon(style="noto", name="guitar", box=(-12, 6, 84, 102), angle=90),
        ShapeLayer(kind="star", rgb=(1, 2, 3), box=(0, 0, 27, 27)),
        Text(text="naïve שלום", font="Cabin-Bold.otf", size=60, x=9, y=90),
        Text(text="a", font="culmus/ShofarDemi-Bold.ttf", size=27, x=-3, y=0, rgb=(9, 8, 7)),
        Photo(file="chelsea.png", box=(15, 18, 150, 180)),
        Photo(file="chelsea.png", crop=(10, 20, 30, 40), box=(15, 18, 150, 180)),
        Icon(style="noto", name="guitar", box=(3, 6, 99, 102), raster=80),
        ShapeLayer(kind="oval", rgb=(1, 2, 3), box=(0, 0, 27, 15), angle=-30),
        Rect(rgb=(4, 5, 6), box=(3, 3, 24, 9)),
    )
    assert picture.scaled(1) == picture
