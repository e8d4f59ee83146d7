"""The list of image formats: in the library, on the command line, and in a server."""

from __future__ import annotations

import pytest
from PIL import Image, features

from qwen2vl.errors import ConfigError, InputError
from qwen2vl.processor.image_formats.formats import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    SERVER_IMAGE_FORMATS,
    describe_unreadable,
    format_of,
    list_formats,
)
from qwen2vl.processor.media.rgb import open_image
from qwen2vl.processor.media.sniff import sniff_type
from qwen2vl.processor.media.source import MediaLimits
from tests.media import encoded, smooth

SERVER = MediaLimits(image_formats=SERVER_IMAGE_FORMATS)
IMAGE = Image.fromarray(smooth(20, 30))


@pytest.mark.parametrize("name", IMAGE_FORMATS)
def test_every_format_is_recognized_and_read(name: str) -> None:
    data = encoded(IMAGE, name)
    assert format_of(sniff_type(data[:256])) == name
    assert open_image(data, MediaLimits(), "x").image.size == (30, 20)


@pytest.mark.parametrize("name", ["AVIF", "PPM"])
def test_a_server_reads_neither_avif_nor_ppm(name: str) -> None:
    kind = {"AVIF": "image/avif", "PPM": "image/x-portable-pixmap"}[name]
    text = f"x is {kind}, not a supported image; supported are JPEG, PNG, GIF, WebP, BMP and TIFF"
    with pytest.raises(InputError, match=text):
        open_image(encoded(IMAGE, name), SERVER, "x")


def test_a_renamed_file_is_not_read_either() -> None:
    """The list holds for what a file is, whatever it is said to be."""
    limits = MediaLimits(image_formats=("PNG",))
    for name in ("JPEG", "TIFF", "BMP", "AVIF", "PPM", "GIF", "WEBP"):
        with pytest.raises(InputError, match="not a supported image; supported are PNG"):
            open_image(encoded(IMAGE, name), limits, "x")
    assert open_image(encoded(IMAGE), limits, "x").image.size == (30, 20)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="image_formats has 'HEIC', must be of JPEG, PNG"):
        MediaLimits(image_formats=("PNG", "HEIC"))


def test_heic_is_refused_with_a_remedy() -> None:
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
    text = "x is image/heic, not a supported image; supported are JPEG, .* AVIF and PPM: save it as"
    with pytest.raises(InputError, match=text):
        open_image(head, MediaLimits(), "x")


def test_pillow_without_avif(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_unreadable("image/avif", IMAGE_FORMATS) == (
        "is a damaged AVIF file; save it again"
    )
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    text = "is an AVIF file, which this build of Pillow cannot read; install pillow>=11.3"
    assert describe_unreadable("image/avif", IMAGE_FORMATS) == text


def test_lists_of_formats() -> None:
    assert list_formats(("PNG",)) == "PNG"
    assert list_formats(("PNG", "WEBP", "TIFF")) == "PNG, WebP and TIFF"
    assert {".avif", ".pgm", ".tif"} < set(IMAGE_SUFFIXES)
