"""TIFF: every photometric interpretation, depth and layout is read right, or refused by name."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from PIL import Image

from qwen2vl.errors import InputError
from tests.media import encoded, smooth
from tests.processor.image_formats.reference import (
    Case,
    differences_from_imagemagick,
    fractions,
    is_close,
    open_rgb,
    rgb_of,
    rgb_of_cmyk,
    rgb_of_ycbcr,
    samples,
)
from tests.processor.image_formats.tiff_files import color_map, tiff
from tests.requirements import needs_imagemagick

PALETTE = np.random.default_rng(2).integers(0, 256, (256, 3))
NUM_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
DEPTHS = (1, 2, 4, 8, 16)
REFUSED = {(3, 16), *((6, bits) for bits in (1, 2, 4))}  # photometric interpretation, bits


def fractions_of(photometric: int, values: np.ndarray, bits: int) -> np.ndarray:
    """Return the colors of samples by the specification, as fractions."""
    if photometric == 0:
        return 1 - fractions(values, bits)
    if photometric == 3:
        return PALETTE[values[..., 0]] / 255
    if photometric == 5:
        return rgb_of_cmyk(fractions(values, bits))
    if photometric == 6:
        return rgb_of_ycbcr(values, bits)
    return fractions(values, bits)


def tags_of(photometric: int, bits: int) -> dict[int, list[int]]:
    if photometric == 3:
        return {320: color_map(PALETTE[: 1 << min(bits, 8)])}
    return {530: [1, 1]} if photometric == 6 else {}


def matrix() -> Iterator[tuple[str, int, int, Case]]:
    """Yield name, photometric interpretation, bits and file of every combination."""
    for photometric, bits, planar in product(NUM_COLORS, DEPTHS, (False, True)):
        values = samples(bits, NUM_COLORS[photometric])
        if photometric == 6 and bits == 8:  # colors that exist
            values = np.array(Image.fromarray(smooth(14, 22)).convert("YCbCr")).astype(int)
        if (photometric, bits) == (6, 16):
            values = np.array(Image.fromarray(smooth(14, 22)).convert("YCbCr")).astype(int) * 257
        for byte_order, deflate in product("<>", (False, True)):
            data = tiff(
                values,
                photometric=photometric,
                bits=bits,
                planar=planar,
                byte_order=byte_order,
                deflate=deflate,
                tags=tags_of(photometric, bits),
            )
            layout = f"{'planar' if planar else 'chunky'} {byte_order} {'z' * deflate}"
            name = f"photometric {photometric}, {bits} bit, {layout}"
            is_refused = (photometric, bits) in REFUSED
            pixels = np.zeros(0) if is_refused else rgb_of(fractions_of(photometric, values, bits))
            yield name, photometric, bits, Case(data, pixels)


ALL = list(matrix())
MATRIX = {name: case for name, *kind, case in ALL if tuple(kind) not in REFUSED}
UNREAD = {name: case for name, *kind, case in ALL if tuple(kind) in REFUSED}


def test_the_matrix_is_complete() -> None:
    assert len(MATRIX) + len(UNREAD) == 6 * 5 * 2 * 4
    assert len(UNREAD) == 4 * 2 * 4


@pytest.mark.parametrize("photometric", NUM_COLORS)
def test_pixels_of_every_photometric_interpretation(photometric: int) -> None:
    wrong = [
        name
        for name, case in MATRIX.items()
        if name.startswith(f"photometric {photometric},")
        and not is_close(open_rgb(case.data)[0], case.pixels)
    ]
    assert not wrong


@pytest.mark.parametrize("name", list(UNREAD)[::4])
def test_the_others_are_refused_by_name(name: str) -> None:
    kind = "3 (palette)" if "photometric 3" in name else "6 (YCbCr)"
    text = f"image 1 is a TIFF of {name.split()[2]}-bit samples, . a pixel, photometric "
    text += "interpretation " + re.escape(kind) + ".*, which is not read; save it as 8-bit RGB"
    with pytest.raises(InputError, match=text):
        open_rgb(UNREAD[name].data)


# ImageMagick 6 inverts WhiteIsZero of 1, 8 and 16 bit only. libtiff inverts every depth.
NOT_INVERTED = [f"photometric 0, {bits} bit" for bits in (2, 4)]


@needs_imagemagick
def test_the_matrix_equals_imagemagick() -> None:
    files = {name: case.data for name, case in MATRIX.items()}
    different = differences_from_imagemagick(files, "tif")
    assert [name for name in different if name[:20] not in NOT_INVERTED] == []


def alpha_cases() -> Iterator[tuple[str, Case]]:
    for photometric, bits, kind in product((0, 1, 2, 5), (8, 16), (1, 2)):
        values = samples(bits, NUM_COLORS[photometric] + 1)
        colors, alpha = values[..., :-1], values[..., -1:]
        if kind == 1:  # stored values are multiplied by alpha
            most = (1 << bits) - 1
            stored = (colors * alpha + most // 2) // most
            values = np.concatenate((stored, alpha), 2)
            colors = np.minimum(stored * most / np.maximum(alpha, 1), most)
        pixels = rgb_of(fractions_of(photometric, colors, bits), fractions(alpha, bits))
        for planar in (False, True):
            data = tiff(
                values, photometric=photometric, bits=bits, planar=planar, extra_samples=[kind]
            )
            layout = "planar" if planar else "chunky"
            yield (
                f"photometric {photometric}, {bits} bit, extra {kind}, {layout}",
                Case(data, pixels),
            )


ALPHA = dict(alpha_cases())


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_composited_on_white(name: str) -> None:
    pixels, notes = open_rgb(ALPHA[name].data)
    assert is_close(pixels, ALPHA[name].pixels)
    assert notes == ("transparency composited on white",)


@needs_imagemagick
def test_alpha_equals_imagemagick() -> None:
    """ImageMagick 6 does not invert WhiteIsZero with alpha, and misreads planes of gray with it."""
    files = {
        name: case.data
        for name, case in ALPHA.items()
        if not name.startswith("photometric 0")
        and not (name.startswith("photometric 1") and name.endswith("planar"))
    }
    assert differences_from_imagemagick(files, "tif") == []


@pytest.mark.parametrize("most", [1, 255])
@pytest.mark.parametrize("kind", [1, 2])
def test_float_alpha_has_a_scale_as_colors_have(kind: int, most: int) -> None:
    values = samples(8, 4) / 255
    values[0, 0] = 1
    colors, alpha = values[..., :3], values[..., 3:]
    stored = np.concatenate((colors * alpha if kind == 1 else colors, alpha), 2) * most
    data = tiff(
        stored.astype(np.float32),
        photometric=2,
        bits=32,
        sample_format=3,
        extra_samples=[kind],
    )
    assert is_close(open_rgb(data)[0], rgb_of(colors, alpha))


def test_extra_samples_without_a_meaning_are_left_out() -> None:
    """Kind 0 is unspecified: a near-infrared band. ImageMagick takes it for alpha."""
    for bits, planar in product((8, 16), (False, True)):
        values = samples(bits, 4)
        data = tiff(values, photometric=2, bits=bits, planar=planar, extra_samples=[0])
        pixels, notes = open_rgb(data)
        assert is_close(pixels, rgb_of(fractions(values[..., :3], bits)))
        assert notes == ()


def test_undeclared_extra_samples_are_alpha() -> None:
    cases = {}
    for photometric, count in ((1, 1), (2, 3)):
        values = samples(8, count + 1)
        cases[f"{photometric}"] = tiff(values, photometric=photometric)
        expected = rgb_of(values[..., :-1] / 255, values[..., -1:] / 255)
        assert is_close(open_rgb(cases[f"{photometric}"])[0], expected)


def layouts() -> Iterator[tuple[str, Case]]:
    for photometric, bits, planar in product((0, 1, 2, 5), (4, 8, 16), (False, True)):
        values = samples(bits, NUM_COLORS[photometric])
        pixels = rgb_of(fractions_of(photometric, values, bits))
        name = f"{photometric}, {bits} bit{', planar' * planar}"
        options = {"photometric": photometric, "bits": bits, "planar": planar}
        yield f"tiles {name}", Case(tiff(values, tile=(16, 16), **options), pixels)
        yield f"strips {name}", Case(tiff(values, rows_per_strip=5, **options), pixels)
        if bits > 4:
            for byte_order in "<>":
                data = tiff(values, predictor=2, deflate=True, byte_order=byte_order, **options)
                yield f"predictor {byte_order} {name}", Case(data, pixels)
        if photometric < 3 and not planar:
            data = tiff(values, fill_order=2, **options)
            yield f"fill order {name}", Case(data, pixels)


LAYOUTS = dict(layouts())


def test_strips_tiles_predictor_and_fill_order() -> None:
    wrong = [n for n, case in LAYOUTS.items() if not is_close(open_rgb(case.data)[0], case.pixels)]
    assert not wrong


@needs_imagemagick
def test_layouts_equal_imagemagick() -> None:
    files = {name: case.data for name, case in LAYOUTS.items() if " 0, 4 bit" not in name}
    assert differences_from_imagemagick(files, "tif") == []


def subsampled(across: int, down: int) -> Case:
    """Write YCbCr with one Cb and Cr for blocks of pixels, whose pixels repeat them."""
    luma = samples(8, 1)[:12, :20, 0]
    chroma = np.random.default_rng(1).integers(100, 156, (12 // down, 20 // across, 2))
    blocks = luma.reshape(12 // down, down, 20 // across, across).transpose(0, 2, 1, 3)
    units = np.concatenate((blocks.reshape(*chroma.shape[:2], -1), chroma), 2)
    plain = tiff(np.zeros((12, 20, 3), int), photometric=6, tags={530: [across, down]})
    body = units.astype(np.uint8).tobytes()
    data = plain[:8] + body.ljust(12 * 20 * 3, b"\0") + plain[8 + 12 * 20 * 3 :]
    whole = np.concatenate((luma[..., None], chroma.repeat(down, 0).repeat(across, 1)), 2)
    return Case(data, rgb_of(rgb_of_ycbcr(whole)))


@pytest.mark.parametrize(("across", "down"), [(2, 1), (2, 2), (4, 2)])
def test_subsampled_chroma_is_repeated(across: int, down: int) -> None:
    case = subsampled(across, down)
    assert is_close(open_rgb(case.data)[0], case.pixels)


@pytest.mark.parametrize("codec", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"])
def test_every_codec_of_bytes_is_read(codec: str) -> None:
    """Planes of 8-bit samples are read by this package: they equal chunky ones of Pillow."""
    image = Image.fromarray(smooth(30, 40))
    chunky = encoded(image, "TIFF", compression=codec)
    want = np.asarray(Image.open(io.BytesIO(chunky)).convert("RGB"))
    np.testing.assert_array_equal(open_rgb(chunky)[0], want)
    gray = encoded(image.convert("L"), "TIFF", compression=codec)
    inverted = gray.replace(
        b"\x06\x01\x03\x00\x01\x00\x00\x00\x01\x00", b"\x06\x01\x03\x00\x01\x00\x00\x00\x00\x00"
    )
    assert inverted != gray
    np.testing.assert_array_equal(open_rgb(inverted)[0], 255 - open_rgb(gray)[0])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (tiff(samples(8, 3), photometric=8), "photometric interpretation 8 (CIELab)"),
        (tiff(samples(8, 3), photometric=9), "photometric interpretation 9 (ICCLab)"),
        (tiff(samples(16, 3), photometric=8, bits=16), "16-bit samples, 3 a pixel, photometric"),
        (tiff(samples(1, 1), photometric=4, bits=1), "4 (transparency mask)"),
        (tiff(samples(16, 1), photometric=32803, bits=16), "color filter array (raw camera data)"),
        (tiff(samples(8, 1), photometric=1, sample_format=2), "a TIFF of signed 8-bit samples"),
        (tiff(samples(16, 1), photometric=1, bits=16, sample_format=2), "of signed 16-bit samples"),
        (tiff(samples(8, 9), photometric=1), "8-bit samples, 9 a pixel"),
        (tiff(samples(8, 4), photometric=5, tags={332: [2]}), "5 (CMYK)"),
        (
            tiff(samples(8, 1) / 255, photometric=0, bits=32, sample_format=3),
            "float 32-bit samples, 1 a pixel, photometric interpretation 0 (gray (WhiteIsZero))",
        ),
        (
            tiff(samples(8, 3) * 9.0, photometric=2, bits=32, sample_format=3),
            "a TIFF of float values from 0 to 2295, which are not colors; scale them to 0..1",
        ),
    ],
)
def test_what_is_no_color_is_refused_by_name(data: bytes, text: str) -> None:
    with pytest.raises(
        InputError, match=r"^image 1 is a TIFF of .*save it as 8-bit RGB|scale"
    ) as e:
        open_rgb(data)
    assert text in str(e.value)


def test_float_colors_are_read_as_arrays_are() -> None:
    values = samples(8, 3)
    for scale in (255.0, 1.0):
        data = tiff(values / scale, photometric=2, bits=32, sample_format=3)
        np.testing.assert_array_equal(open_rgb(data)[0], values)


def test_floats_a_little_above_one_are_clipped_as_in_arrays() -> None:
    values = samples(8, 3)
    data = tiff(values * (1.0001 / 255), photometric=2, bits=32, sample_format=3)
    assert is_close(open_rgb(data)[0], values)
    data = tiff(values * (2 / 255), photometric=2, bits=32, sample_format=3)
    with pytest.raises(InputError, match="float values from 0 to 2, which are not colors"):
        open_rgb(data)


def test_a_color_map_of_8_bit_values_is_not_black() -> None:
    values = samples(8, 1)
    data = tiff(values, photometric=3, tags={320: PALETTE.T.ravel().tolist()})
    np.testing.assert_array_equal(open_rgb(data)[0], PALETTE[values[..., 0]])


@pytest.mark.parametrize("cut", [0.2, 0.9])
def test_a_file_that_ends_early_is_damaged(cut: float) -> None:
    values = samples(16, 4)
    data = tiff(values, photometric=2, bits=16, extra_samples=[2], rows_per_strip=3)
    start = data.index(data[-200:])  # the tags follow the pixels: empty these
    damaged = data[:8] + data[8 : int(start * cut)] + bytes(0)
    with pytest.raises(InputError, match="is a damaged TIFF file"):
        open_rgb(damaged)
    planar = tiff(values, photometric=2, bits=16, planar=True, extra_samples=[2], deflate=True)
    with pytest.raises(InputError, match="is damaged: its pixels end early"):
        open_rgb(planar[:8] + bytes(400) + planar[408:])


def test_the_first_page_is_read_whatever_the_others_are() -> None:
    first = Image.fromarray(smooth(20, 30))
    for mode in ("L", "LAB"):
        for byte_order in ({}, {"big_tiff": True}):
            others = [Image.new(mode, (20, 20))] * 2
            data = encoded(first, "TIFF", save_all=True, append_images=others, **byte_order)
            pixels, notes = open_rgb(data)
            np.testing.assert_array_equal(pixels, np.asarray(first))
            assert notes == ("first of 3 frames",)


def test_pages_that_are_linked_in_a_circle_end() -> None:
    data = tiff(samples(8, 3), photometric=2)
    start = int.from_bytes(data[4:8], "little")
    link = start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")
    for target in (start, len(data) + 9, link + 4):
        circle = data[:link] + struct.pack("<I", target) + data[link + 4 :]
        pixels, notes = open_rgb(circle)
        np.testing.assert_array_equal(pixels, samples(8, 3))
        assert notes in ((), ("first of 2 frames",))


def test_many_pages_cost_little() -> None:
    """A page takes 18 bytes: half a megabyte of them is counted, and none of them is read."""
    data = tiff(samples(8, 3), photometric=2)
    start = int.from_bytes(data[4:8], "little")
    link = start + 2 + 12 * int.from_bytes(data[start : start + 2], "little")
    first = len(data)
    entry = struct.pack("<HHHII", 1, 256, 3, 1, 1)
    pages = b"".join(entry + struct.pack("<I", first + 18 * i) for i in range(1, 30_000))
    data = data[:link] + struct.pack("<I", first) + data[link + 4 :] + pages
    began = time.process_time()
    _, notes = open_rgb(data)
    assert time.process_time() - began < 1
    assert notes == ("first of 30000 frames",)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_number_of_strips_is_bounded(bits: int) -> None:
    """Strips of one pixel: each costs more than its pixel does."""
    few, many = (
        tiff(np.zeros((height, 1, 1), int), photometric=0, bits=bits, rows_per_strip=1)
        for height in (60, 70_000)
    )
    assert open_rgb(few)[0].shape == (60, 1, 3)
    with pytest.raises(InputError, match="is a TIFF of 70,000 strips or tiles, limit is 65,536"):
        open_rgb(many)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_that_share_one_place_are_bounded(bits: int) -> None:
    """1,000 tiles of 4 megapixels each, all of them in 4 KB of the file."""
    body = zlib.compress(bytes(1 << 22))
    tags = [(256, 1), (257, 1000), (258, bits), (259, 8), (262, 0), (277, 1)]
    tags += [(322, 1 << 22), (323, 1)]
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    places = struct.pack("<1000I", *[at + 8000] * 1000)
    counts = struct.pack("<1000I", *[len(body)] * 1000)
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    for number, tag in enumerate((324, 325)):
        entries.append(struct.pack("<HHII", tag, 4, 1000, at + number * 4000))
    table = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4)
    began = time.process_time()
    with pytest.raises(InputError, match="is a damaged TIFF file"):
        open_rgb(table + places + counts + body)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("tags", [{532: [0, 0, 128, 255, 128, 255]}, {529: [1, 0, 0]}, {532: [1]}])
def test_ycbcr_that_converts_no_color_is_damaged(tags: dict[int, list[int]]) -> None:
    data = tiff(samples(8, 3), photometric=6, planar=True, tags={530: [1, 1], **tags})
    with pytest.raises(InputError, match="is damaged"):
        open_rgb(data)


def test_big_tiff_is_read() -> None:
    image = Image.fromarray(smooth(20, 30))
    data = encoded(image, "TIFF", big_tiff=True)
    np.testing.assert_array_equal(open_rgb(data)[0], np.asarray(image))


@pytest.mark.parametrize("codec", ["group3", "group4", "tiff_ccitt", "jpeg"])
def test_codecs_of_pixels_are_left_to_pillow(codec: str) -> None:
    image = Image.fromarray(smooth(20, 30)).convert("1" if codec != "jpeg" else "RGB")
    data = encoded(image, "TIFF", compression=codec)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(open_rgb(data)[0], want)
