"""Generated photos and figures: reproducible, varied, and painted into their box only."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2vl.synth.compositing import Composite, Ground, draw_composite
from qwen2vl.synth.compositing.generated import (
    FIGURE_KINDS,
    PHOTO_SIDE,
    figure_mask,
    generate_photo,
)
from qwen2vl.synth.compositing.layers import Generated


def test_photos_are_reproducible_and_differ() -> None:
    photos = [np.asarray(generate_photo.__wrapped__(seed), np.float32) for seed in range(12)]
    again = np.asarray(generate_photo.__wrapped__(3), np.float32)
    assert (again == photos[3]).all()
    assert photos[0].shape == (PHOTO_SIDE, PHOTO_SIDE, 3)
    for index, photo in enumerate(photos):
        assert all(np.abs(photo - other).mean() > 5 for other in photos[:index])


def test_photos_have_neighbors_of_similar_brightness_and_no_plain_color() -> None:
    for seed in range(20):
        gray = np.asarray(generate_photo(seed).convert("L"), np.float32)
        assert gray.std() > 1.5
        shuffled = np.random.default_rng(0).permutation(gray.ravel()).reshape(gray.shape)
        near, far = (np.abs(np.diff(image, axis=1)).mean() for image in (gray, shuffled))
        assert near < far


def test_most_photos_are_of_muted_colors() -> None:
    spread: list[float] = []
    for seed in range(30):
        pixels = np.asarray(generate_photo(seed), np.int16)
        spread.append(float(np.median(pixels.max(axis=2) - pixels.min(axis=2))))
    assert np.median(spread) < 60
    assert max(spread) < 160


@pytest.mark.parametrize("kind", FIGURE_KINDS)
def test_figures_touch_all_sides_and_fill_a_part(kind: str) -> None:
    for seed in range(8):
        mask = np.asarray(figure_mask(kind, seed, (60, 40)))
        assert mask.shape == (40, 60)
        for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
            assert side.max() > 60
        assert 0.05 < mask.mean() / 255 < 0.95
        assert (mask == np.asarray(figure_mask(kind, seed, (60, 40)))).all()
        assert (mask != np.asarray(figure_mask(kind, seed + 1, (60, 40)))).any()


def test_a_figure_is_painted_in_its_color_within_its_box() -> None:
    figure = Generated(kind="blob", seed=4, rgb=(255, 0, 0), box=(10, 5, 50, 35))
    pixels = draw_composite(Composite(width=60, height=40, ground=Ground(), layers=(figure,)))
    is_red = (pixels == (255, 0, 0)).all(axis=2)
    assert is_red[5:35, 10:50].mean() > 0.4
    is_red[5:35, 10:50] = False
    assert not is_red.any()


def test_a_photo_fills_its_box_and_is_scaled_with_the_picture() -> None:
    photo = Generated(kind="photo", seed=5, box=(0, 0, 50, 30))
    picture = Composite(width=70, height=30, layers=(photo,))
    pixels = draw_composite(picture)
    assert (pixels[:, 50:] == 255).all()
    expected = np.asarray(generate_photo(5).resize((50, 30)))
    assert (pixels[:, :50] == expected).all()
    assert draw_composite(picture.scaled(2)).shape == (60, 140, 3)
    assert Composite.from_json(picture.to_json()) == picture
