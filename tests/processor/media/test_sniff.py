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
