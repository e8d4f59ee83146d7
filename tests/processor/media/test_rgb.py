"""Image decoding: every kind of image -> upright, opaque 8-bit RGB, as Pillow where opaque."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qwen2vl.errors import InputError
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.source import DEFAULT_LIMITS, MediaLimits
from tests.media import FORMATS, animation, encoded, noise, smooth

IMAGE = Image.fromarray(smooth(40, 60))
GRAY = 128


def open_rgb(source: Any, **options: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's warnings must not reach the user
        image, notes, _ = open_image(source, DEFAULT_LIMITS, "image 1", **options)
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
def test_opaque_files_equal_pillow_convert(kind: str, mode: str) -> None:
    data = encoded(IMAGE.convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        want = np.asarray(image.convert("RGB"))
    got, notes = open_rgb(data)
    np.testing.assert_array_equal(got, want)
    assert notes == ()


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(IMAGE))
    want = np.asarray(IMAGE)
    tensor_CHW = torch.tensor(want).permute(2, 0, 1)
    sources = (
        tmp_path / "a.png",
        encoded(IMAGE),
        io.BytesIO(encoded(IMAGE)),
        IMAGE,
        want,
        np.asfortranarray(want),
        want.transpose(2, 0, 1),
        tensor_CHW,
        tensor_CHW.permute(1, 2, 0),
        tensor_CHW / 255,
        (tensor_CHW / 255).requires_grad_(),
        (tensor_CHW / 255).double(),
        tensor_CHW.to(torch.bfloat16),
    )
    for source in sources:
        np.testing.assert_array_equal(open_rgb(source)[0], want)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    """The first stored row and column are where the EXIF specification places them."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16] += np.array([200, 0, 0], np.uint8)  # row 0: red
    stored[:, :24] += np.array([0, 200, 0], np.uint8)  # column 0: green
    exif = Image.Exif()
    exif[0x112] = orientation
    got, notes = open_rgb(encoded(stored, kind, exif=exif.tobytes()))
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
    assert bool(notes) == (orientation > 1)


def test_exif_orientation_can_be_ignored() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(IMAGE, "JPEG", exif=exif.tobytes())
    assert open_rgb(data)[0].shape == (60, 40, 3)
    assert open_rgb(data, apply_exif_orientation=False)[0].shape == (40, 60, 3)


def test_exif_orientation_of_pil_images_is_applied() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    with Image.open(io.BytesIO(encoded(IMAGE, "JPEG", exif=exif.tobytes()))) as image:
        assert open_rgb(image)[0].shape == (60, 40, 3)


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
    pixels, notes = open_rgb(source)
    assert (pixels == GRAY).all()
    assert len(notes) == 1


def test_16_bit_range_is_mapped_to_8_bit() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    gray = open_rgb(ramp)[0][..., 0].ravel()
    assert (gray[[0, 65535]] == (0, 255)).all()
    assert (np.abs(gray - ramp.ravel() / 257) <= 0.5).all()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            np.full((9, 9), 1000.5, np.float32),
            "float32 values from 1000.5 to 1000.5 are not colors",
        ),
        (np.full((9, 9), -0.5, np.float32), "values from -0.5 to -0.5 are not colors"),
        (np.full((9, 9), np.nan, np.float32), "holds NaN or infinite values"),
        (np.full((9, 9), 70000, np.int32), "int32 values from 70000 to 70000"),
        (np.full((9, 9), -1, np.int32), "int32 values from -1 to -1"),
    ],
)
def test_values_out_of_range_are_rejected(values: np.ndarray, text: str) -> None:
    for source in (values, Image.fromarray(values)):
        with pytest.raises(InputError, match=text):
            open_rgb(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_closed_pil_images_are_not_called_damaged(kind: str) -> None:
    closed = Image.open(io.BytesIO(encoded(IMAGE, kind)))
    closed.load()
    closed.close()
    with Image.open(io.BytesIO(encoded(IMAGE, kind))) as unread:
        pass
    file = io.BytesIO(encoded(IMAGE, kind))
    without_file = Image.open(file)
    file.close()
    for image in (closed, unread, without_file):
        with pytest.raises(InputError, match="image 1 is a closed PIL image; open it again"):
            open_rgb(image)
    damaged = Image.open(io.BytesIO(encoded(IMAGE, kind)[:-60]))
    for _ in range(2):
        with pytest.raises(InputError, match="is damaged"):
            open_rgb(damaged)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((3, 224, 3), r"shape \(3, 224, 3\) could have its channels first or last"),
        ((3, 224, 4), r"shape \(3, 224, 4\) could have its channels first or last; give a PIL im"),
        ((1, 224, 1), r"shape \(1, 224, 1\) could have its channels first or last"),
        ((224, 224, 2), "not an image"),
        ((7,), "not an image"),
        ((2, 9, 9, 3), "not an image but a video; give it as video, not image, or one frame"),
        ((0, 9, 3), "has no pixels"),
    ],
)
def test_ambiguous_array_shapes_are_rejected(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        open_rgb(np.zeros(shape, np.uint8))


def test_arrays_of_other_dtypes_are_rejected() -> None:
    with pytest.raises(InputError, match=r"int64 values .* are not colors; scale them to uint8"):
        open_rgb(np.full((9, 9, 3), 70000, np.int64))
    with pytest.raises(InputError, match=r"an array of object holds no numbers; give uint8 0..255"):
        open_rgb(np.zeros((9, 9, 3), object))


def _half_transparent(mode: str) -> Image.Image:
    """Return an image whose right half is transparent black."""
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 10, 10))
    return image.convert(mode)


def _palette(kind: str) -> bytes:
    image = Image.new("P", (20, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])  # color 0 is transparent, 1 is black
    image.paste(0, (10, 0, 20, 10))
    return encoded(image, kind, transparency=0)


def _color_keyed(mode: str, background: Any, key: Any) -> bytes:
    image = Image.new(mode, (20, 10), background)
    image.paste(key, (10, 0, 20, 10))
    return encoded(image, "PNG", transparency=key)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(_half_transparent("RGBA"), id="RGBA"),
        pytest.param(_half_transparent("LA"), id="LA"),
        pytest.param(_half_transparent("RGBa"), id="RGBa"),
        pytest.param(_half_transparent("LA").convert("La"), id="La"),
        pytest.param(encoded(_half_transparent("RGBA"), "PNG"), id="RGBA-png"),
        pytest.param(encoded(_half_transparent("RGBA"), "WEBP", lossless=True), id="RGBA-webp"),
        pytest.param(encoded(_half_transparent("LA"), "PNG"), id="LA-png"),
        pytest.param(_palette("PNG"), id="P-png"),
        pytest.param(_palette("GIF"), id="P-gif"),
        pytest.param(_color_keyed("RGB", (0, 0, 0), (9, 8, 7)), id="RGB-key"),
        pytest.param(_color_keyed("L", 0, 9), id="L-key"),
        pytest.param(np.asarray(_half_transparent("RGBA")), id="RGBA-array"),
    ],
)
def test_transparency_is_composited_on_white(source: Any) -> None:
    pixels, notes = open_rgb(source)
    assert (pixels[:, :10] == 0).all()
    assert (pixels[:, 10:] == 255).all()
    assert notes == ("transparency composited on white",)


def test_partial_transparency_is_blended_and_opaque_alpha_ignored() -> None:
    mixed, _ = open_rgb(Image.new("RGBA", (4, 4), (0, 100, 255, 128)))
    assert np.abs(mixed.astype(int) - (127, 177, 255)).max() <= 1
    opaque = IMAGE.convert("RGBA")
    np.testing.assert_array_equal(open_rgb(opaque)[0], np.asarray(IMAGE))
    assert open_rgb(opaque)[1] == ()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB", "RGBX", "PA", "I;16", "I;16B"])
def test_rare_modes_become_rgb(mode: str) -> None:
    assert open_rgb(Image.new(mode, (9, 7)))[0].shape == (7, 9, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations_is_used(kind: str) -> None:
    pixels, notes = open_rgb(animation(kind))
    assert (pixels < 5).all()
    assert notes == ("first of 4 frames",)


def test_damaged_second_frame_is_ignored() -> None:
    data = animation("GIF", 6)
    assert (open_rgb(data[: len(data) * 2 // 3])[0] == 0).all()


def test_declared_type_differs_from_the_content() -> None:
    url = "data:image/jpg;base64," + base64.b64encode(encoded(IMAGE, "GIF")).decode()
    assert open_rgb(url)[1] == ("declared as image/jpg, read as image/gif",)
    url = "data:image/jpg;base64," + base64.b64encode(encoded(IMAGE, "JPEG")).decode()
    assert open_rgb(url)[1] == ()


def test_limits_apply_to_every_kind_of_source() -> None:
    limits = MediaLimits(max_image_pixels=2000)
    text = "image 1 is 60 x 40 .*limit is 2,000"
    for source in (IMAGE, np.asarray(IMAGE), encoded(IMAGE)):
        with pytest.raises(InputError, match=text):
            open_image(source, limits, "image 1")


def test_random_damage_is_decoded_or_rejected() -> None:
    """Any bytes give either pixels or an InputError."""
    generator = np.random.default_rng(7)
    errors = []
    for kind in FORMATS:
        whole = np.frombuffer(encoded(noise(30, 30), kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            places = generator.integers(0, len(whole), generator.integers(1, 20))
            damaged[places] = generator.integers(0, 256, len(places), dtype=np.uint8)
            try:
                open_rgb(damaged.tobytes())
            except InputError as error:
                errors.append(str(error))
    assert 20 < len(errors) < 6 * 40
    assert all(text.startswith("image 1") for text in errors)


def test_a_jpeg_of_many_scans_is_refused() -> None:
    file = io.BytesIO()
    IMAGE.save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    open_rgb(data[:-2] + scan * 50 + data[-2:])
    with pytest.raises(InputError, match="more than 100 scans"):
        open_rgb(data[:-2] + scan * 100 + data[-2:])
    open_rgb(data + scan * 200)  # after the end of the image
    comments = b"\xff\xfe\x00\x02" * 6000
    with pytest.raises(InputError, match="scans"):
        open_rgb(data[:2] + comments + data[2:])
