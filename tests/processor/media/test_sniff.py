"""Media types by the first bytes of a file."""

from __future__ import annotations

import pytest

from qwen2vl.processor.media.sniff import sniff_type
from tests.media import audio_only, encoded, encoded_video, smooth


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (encoded(smooth(9, 9)), "image/png"),
        (encoded(smooth(9, 9), "WEBP"), "image/webp"),
        (encoded(smooth(9, 9), "TIFF"), "image/tiff"),
        (encoded_video(2), "video/mp4"),
        (audio_only(), "video/mp4"),
        (encoded_video(2, container="mpegts"), "video/mp2t"),
        (encoded_video(2, container="matroska"), "video/x-matroska"),
        (b"\0\0\0\x6cmoov\0\0\0\x6cmvhd", "video/quicktime"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image/heic"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "image/heic"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "image/avif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heicavif", "image/heic"),  # beyond the box
        (b"\0\0\0\x1cftypavis\0\0\0\0avifavismsf1", "image/avif"),
        (b"\0\0\0\x18ftyphevx\0\0\0\0msf1hevx", "image/heic"),
        (encoded(smooth(9, 9), "AVIF"), "image/avif"),
        (encoded(smooth(9, 9), "PPM"), "image/x-portable-pixmap"),
        (b"P1\n# a comment\n2 2\n0 1 1 0", "image/x-portable-bitmap"),
        (b"P5\t9 9 255\n", "image/x-portable-graymap"),
        (b"P7\nWIDTH 9\n", "image/x-portable-arbitrarymap"),
        (b"Pf\n9 9\n-1.0\n", "image/x-portable-floatmap"),
        (b"P3 is the third of them", "text/plain"),
        (b"P65 3", "text/plain"),
        (b"%PDF-1.7\n", "application/pdf"),
        (b"\xef\xbb\xbf <!DOCTYPE html><p>", "text/html"),
        (b"<?xml version='1.0'?>\n<svg xmlns=''>", "image/svg+xml"),
        (b'  {"error": 404}', "application/json"),
        (b"hello there", "text/plain"),
        (b"\x01\x02\x03\x04", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_sniffed_media_types(head: bytes, kind: str) -> None:
    assert sniff_type(head[:256]) == kind
