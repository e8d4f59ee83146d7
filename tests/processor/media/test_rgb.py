"""Every kind of picture becomes upright, opaque 8-bit RGB; opaque 8-bit files are not touched."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from tests.media import FORMATS, animation, encoded, noise, smooth

PICTURE = Image.fromarray(smooth(40, 60))
GRAY = 128


def opened(source: Any, **options: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warnings must not reach people
        image, notes = open_image(source, DEFAULT_LIMITS, "image 1", **options)
    assert image.mode == "RGB"
    return np.asarray(image), notes


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "L", "P", "1")),
        *(("GIF", mode) for mode in ("RGB", "L", "P", "1")),
        *(("WEBP", mode) for mode in ("RGB", "L", "P")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
        *(("TIFF", mode) for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr")),
    ],
)
def test_opaque_files_are_what_pillow_converts(kind: str, mode: str) -> None:
    data = encoded(PICTURE.convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        want = np.asarray(image.convert("RGB"))
    got, notes = opened(data)
    np.testing.assert_array_equal(got, want)
    assert notes == ()


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(PICTURE))
    want = np.asarray(PICTURE)
    sources = (tmp_path / "a.png", encoded(PICTURE), PICTURE, want, np.asfortranarray(want))
    for source in sources:
        np.testing.assert_array_equal(opened(source)[0], want)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_as_people_see_them(kind: str, orientation: int) -> None:
    """The first row and column of the stored raster lie where EXIF's table says."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16] += np.array([200, 0, 0], np.uint8)  # row 0: red
    stored[:, :24] += np.array([0, 200, 0], np.uint8)  # column 0: green
    exif = Image.Exif()
    exif[0x112] = orientation
    got, notes = opened(encoded(stored, kind, exif=exif.tobytes()))
    red, green = got[..., 0] > 100, got[..., 1] > 100
    sides = {
        side: (cut[0].mean() > 0.9, cut[1].mean() > 0.9)
        for side, cut in {
            "top": (red[:12], green[:12]),
            "bottom": (red[-12:], green[-12:]),
            "left": (red[:, :12], green[:, :12]),
            "right": (red[:, -12:], green[:, -12:]),
        }.items()
    }
    where = ("top left", "top right", "bottom right", "bottom left")
    where += ("left top", "right top", "right bottom", "left bottom")
    row, column = where[orientation - 1].split()
    assert sides[row][0], "the stored first row"
    assert sides[column][1], "the stored first column"
    assert got.shape[:2] == ((32, 48) if orientation < 5 else (48, 32))
    assert bool(notes) == (orientation > 1 and kind != "TIFF")  # Pillow itself turns TIFF


def test_turning_can_be_left_out() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(PICTURE, "JPEG", exif=exif.tobytes())
    assert opened(data)[0].shape == (60, 40, 3)
    assert opened(data, turn=False)[0].shape == (40, 60, 3)


def test_opened_pil_images_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(io.BytesIO(encoded(PICTURE, "JPEG", exif=exif.tobytes()))) as image:
        assert opened(image)[0].shape == (60, 40, 3)


@pytest.mark.parametrize(
    "source",
    [
        encoded(np.full((9, 9), 32768, np.uint16), "PNG"),
        encoded(np.full((9, 9), 32768, np.uint16), "TIFF"),
        encoded(np.full((9, 9), 0.5, np.float32), "TIFF"),
        Image.fromarray(np.full((9, 9), 32768, np.int32)),
        Image.fromarray(np.full((9, 9), 128, np.int32)),
        Image.fromarray(np.full((9, 9), 0.5, np.float32)),
        Image.fromarray(np.full((9, 9), 127.6, np.float32)),
        np.full((9, 9), 32768, np.uint16),
        np.full((9, 9, 3), 0.5),
        np.full((9, 9, 1), 0.5, np.float16),
    ],
)
def test_middle_gray_stays_middle_gray(source: Any) -> None:
    pixels, notes = opened(source)
    assert (pixels == GRAY).all()
    assert len(notes) == 1


def test_sixteen_bits_keep_both_ends() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    gray = opened(ramp)[0][..., 0].ravel()
    assert (gray[[0, 65535]] == (0, 255)).all()
    assert (np.abs(gray - ramp.ravel() / 257) <= 0.5).all()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            np.full((9, 9), 1000.5, np.float32),
            "float32 values from 1000.5 to 1000.5 are no colors",
        ),
        (np.full((9, 9), -0.5, np.float32), "values from -0.5 to -0.5 are no colors"),
        (np.full((9, 9), np.nan, np.float32), "holds NaN or infinite values"),
        (np.full((9, 9), 70000, np.int32), "int32 values from 70000 to 70000"),
        (np.full((9, 9), -1, np.int32), "int32 values from -1 to -1"),
    ],
)
def test_values_without_a_color_are_refused(values: np.ndarray, text: str) -> None:
    for source in (values, Image.fromarray(values)):
        with pytest.raises(InputError, match=text):
            opened(source)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3, 224, 3), r"shape \(3, 224, 3\) could have its channels first or last"),
        ((3, 224, 224), r"not a picture.*array.transpose\(1, 2, 0\)"),
        ((224, 224, 2), "not a picture"),
        ((7,), "not a picture"),
        ((2, 9, 9, 3), "not a picture"),
        ((0, 9, 3), "has no pixels"),
    ],
)
def test_channels_are_never_guessed(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        opened(np.zeros(shape, np.uint8))


def test_arrays_of_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"int64 values .* are no colors; scale them to uint8"):
        opened(np.zeros((9, 9, 3), np.int64))
    with pytest.raises(InputError, match=r"an array of object holds no numbers; give uint8 0..255"):
        opened(np.zeros((9, 9, 3), object))


def _see_through(mode: str) -> Image.Image:
    """Half of the picture is transparent, with black hidden below."""
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 10))
    return image.convert(mode)


def _palette(kind: str) -> bytes:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])  # color 0 is see-through, 1 is black
    image.paste(0, (10, 0, 20, 10))
    return encoded(image, kind, transparency=0)


def _keyed(mode: str, ground: Any, key: Any) -> bytes:
    image = Image.new(mode, (20, 10), ground)
    image.paste(key, (10, 0, 20, 10))
    return encoded(image, "PNG", transparency=key)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(_see_through("RGBA"), id="RGBA"),
        pytest.param(_see_through("LA"), id="LA"),
        pytest.param(_see_through("RGBa"), id="RGBa"),
        pytest.param(_see_through("LA").convert("La"), id="La"),
        pytest.param(encoded(_see_through("RGBA"), "PNG"), id="RGBA-png"),
        pytest.param(encoded(_see_through("RGBA"), "WEBP", lossless=True), id="RGBA-webp"),
        pytest.param(encoded(_see_through("LA"), "PNG"), id="LA-png"),
        pytest.param(_palette("PNG"), id="P-png"),
        pytest.param(_palette("GIF"), id="P-gif"),
        pytest.param(_keyed("RGB", (0, 0, 0), (9, 8, 7)), id="RGB-key"),
        pytest.param(_keyed("L", 0, 9), id="L-key"),
        pytest.param(np.asarray(_see_through("RGBA")), id="RGBA-array"),
    ],
)
def test_transparency_is_laid_on_white(source: Any) -> None:
    pixels, notes = opened(source)
    assert (pixels[:, :10] == 0).all()
    assert (pixels[:, 10:] == 255).all()
    assert notes == ("transparency laid on white",)


def test_half_transparency_is_mixed_and_opaque_alpha_changes_nothing() -> None:
    mixed, _ = opened(Image.new("RGBA", (4, 4), (0, 100, 255, 128)))
    assert np.abs(mixed.astype(int) - (127, 177, 255)).max() <= 1
    opaque = PICTURE.convert("RGBA")
    np.testing.assert_array_equal(opened(opaque)[0], np.asarray(PICTURE))
    assert opened(opaque)[1] == ()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "PA", "I;16", "I;16B"])
def test_rarer_modes_become_rgb(mode: str) -> None:
    assert opened(Image.new(mode, (9, 7)))[0].shape == (7, 9, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_show_their_first_frame(kind: str) -> None:
    pixels, notes = opened(animation(kind))
    assert (pixels < 5).all()
    assert notes == ("first of 4 frames",)


def test_a_damaged_second_frame_does_not_matter() -> None:
    data = animation("GIF", 6)
    assert (opened(data[: len(data) * 2 // 3])[0] == 0).all()


def test_declared_and_real_type() -> None:
    url = "data:image/jpg;base64," + base64.b64encode(encoded(PICTURE, "GIF")).decode()
    assert opened(url)[1] == ("declared as image/jpg, read as image/gif",)
    url = "data:image/jpg;base64," + base64.b64encode(encoded(PICTURE, "JPEG")).decode()
    assert opened(url)[1] == ()


def test_limits_count_for_every_kind_of_source() -> None:
    limits = MediaLimits(max_image_pixels=2000)
    text = "image 1 is 60 x 40 .*limit is 2,000"
    for source in (PICTURE, np.asarray(PICTURE), encoded(PICTURE)):
        with pytest.raises(InputError, match=text):
            open_image(source, limits, "image 1")


def test_random_damage_never_escapes() -> None:
    """Whatever bytes come, the answer is pixels or one InputError."""
    generator = np.random.default_rng(7)
    refusals = []
    for kind in FORMATS:
        whole = np.frombuffer(encoded(noise(30, 30), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            places = generator.integers(0, len(whole), generator.integers(1, 20))
            damaged[places] = generator.integers(0, 256, len(places), dtype=np.uint8)
            try:
                opened(damaged.tobytes())
            except InputError as error:
                refusals.append(str(error))
    assert 20 < len(refusals) < 6 * 40
    assert all(text.startswith("image 1") for text in refusals)
