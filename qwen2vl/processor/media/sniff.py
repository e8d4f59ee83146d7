"""Media type sniffing: the first bytes of a file -> "image/png", "video/mp4", "text/html", ...

By magic bytes, for dispatch between decoders and for error texts, not for security: each decoder
accepts only the formats of its own list (rgb.py, video_packets.py). Text is recognized by its first
word, so that an HTML error page in place of an image is named in the error.
(WHATWG: MIME Sniffing.)
"""

from __future__ import annotations

import re

__all__ = ["sniff_type"]

_MAGIC: tuple[tuple[bytes, int, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", 0, "image/png"),
    (b"\xff\xd8\xff", 0, "image/jpeg"),
    (b"GIF8", 0, "image/gif"),
    (b"WEBP", 8, "image/webp"),
    (b"BM", 0, "image/bmp"),
    (b"II*\x00", 0, "image/tiff"),
    (b"MM\x00*", 0, "image/tiff"),
    (b"II+\x00", 0, "image/tiff"),
    (b"MM\x00+", 0, "image/tiff"),
    (b"%PDF", 0, "application/pdf"),
    (b"%!PS", 0, "application/postscript"),
    (b"\xc5\xd0\xd3\xc6", 0, "application/postscript"),
    (b"8BPS", 0, "image/vnd.adobe.photoshop"),
    (b"\x00\x00\x00\x0cjP  ", 0, "image/jp2"),
    (b"\xff\x4f\xff\x51", 0, "image/jp2"),
    (b"ftypheic", 4, "image/heic"),
    (b"ftypheix", 4, "image/heic"),
    (b"ftypheim", 4, "image/heic"),
    (b"ftypheis", 4, "image/heic"),
    (b"ftypmif1", 4, "image/heic"),  # unless a compatible brand says AVIF
    (b"ftypmsf1", 4, "image/heic"),
    (b"ftyphevc", 4, "image/heic"),
    (b"ftyphevx", 4, "image/heic"),
    (b"ftypavif", 4, "image/avif"),
    (b"ftypavis", 4, "image/avif"),
    (b"ftyp", 4, "video/mp4"),
    (b"moov", 4, "video/quicktime"),
    (b"mdat", 4, "video/quicktime"),
    (b"wide", 4, "video/quicktime"),
    (b"\x1aE\xdf\xa3", 0, "video/x-matroska"),
    (b"AVI ", 8, "video/x-msvideo"),
    (b"WAVE", 8, "audio/wav"),
    (b"FLV\x01", 0, "video/x-flv"),
    (b"OggS", 0, "video/ogg"),
    (b"\x00\x00\x01\xba", 0, "video/mpeg"),
    (b"\x00\x00\x01\xb3", 0, "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, "video/x-ms-asf"),
    (b"ID3", 0, "audio/mpeg"),
    (b"fLaC", 0, "audio/flac"),
    (b"PK\x03\x04", 0, "application/zip"),
    (b"\x1f\x8b", 0, "application/gzip"),
)
_AVIF_BRANDS = (b"avif", b"avis")
# The magic of Netpbm is two letters, as of a text: a comment or a number has to follow.
_NETPBM = re.compile(rb"P([1-7Ff])(?:[ \t\r\n]+|#[^\n]*\n)+(?:\d|[WHDMT][A-Z]{4})")
_NETPBM_NAMES = {
    "1": "bitmap",
    "2": "graymap",
    "3": "pixmap",
    "4": "bitmap",
    "5": "graymap",
    "6": "pixmap",
    "7": "arbitrarymap",
    "F": "floatmap",
    "f": "floatmap",
}
_TEXT_STARTS = (
    (("<!doctype html", "<html", "<head", "<body"), "text/html"),
    (("<svg",), "image/svg+xml"),
    (("<?xml",), "text/xml"),
    (("{", "["), "application/json"),
)


def sniff_type(head: bytes) -> str:
    """Return the media type by magic bytes; for error texts and dispatch, not for security."""
    for magic, offset, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return "image/avif" if kind == "image/heic" and _has_avif_brand(head) else kind
    if netpbm := _NETPBM.match(head):
        return f"image/x-portable-{_NETPBM_NAMES[netpbm[1].decode()]}"
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    for starts, kind in _TEXT_STARTS:
        if text.startswith(starts):
            return "image/svg+xml" if "<svg" in text else kind
    binary = sum(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head)
    if binary and head[:1] == head[188:189] == b"G":  # the sync byte of each packet of 188 bytes
        return "video/mp2t"
    return "text/plain" if text and not binary else "application/octet-stream"


def _has_avif_brand(head: bytes) -> bool:
    """Return whether the compatible brands of an ISO base media file have one of AVIF."""
    size = int.from_bytes(head[:4], "big")
    return any(
        head[start : start + 4] in _AVIF_BRANDS for start in range(16, min(size, len(head)), 4)
    )
