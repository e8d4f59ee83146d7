"""Data URLs: "data:image/png;base64,..." -> bytes and the media type that is declared.

Whitespace and percent-encoding are removed. Base64 in which "+" has become a space, as in a form or
in the query of a URL, is refused: other characters would be decoded without an error. (RFC 2397.)
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

from qwen2vl.errors import InputError, MediaTooLargeError

__all__ = ["decode_data_url", "looks_like_base64"]

_MEDIA_TYPE = re.compile(r"[a-z0-9.+-]{1,30}/[a-z0-9.+-]{1,60}")  # is shown in notes
_MAX_FILE_NAME = 255  # characters; longer names without a dot are no paths
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
# The first bytes of PNG, JPEG, GIF, WebP or AVI, and Matroska.
_BASE64_OF_MEDIA = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|GkXfo)[A-Za-z0-9+/=\s]{40,}")
_SPACES_WITHIN = re.compile(r"[A-Za-z0-9/=]+(?: +[A-Za-z0-9/=]+)+ *")  # and no "+"


def decode_data_url(source: str, max_bytes: int, name: str) -> tuple[bytes, str | None]:
    """Decode a data URL: base64, or percent-encoded without ";base64".

    Returns:
        The content, and the media type in lower case; None if it declares no valid one.

    Raises:
        InputError: no comma, or invalid base64.
        MediaTooLargeError: more than `max_bytes`, by its length.
    """
    head, comma, payload = source[5:].partition(",")
    if not comma:
        raise InputError(f"{name}: data URL without a comma; write data:image/png;base64,...")
    if len(payload) > max_bytes / 3 * 4 + 4:
        raise MediaTooLargeError(
            f"{name}: data URL of {len(payload):,} characters, limit is {max_bytes:,} bytes; send "
            "a smaller file"
        )
    content_type, *parameters = (part.strip() for part in head.lower().split(";"))
    if "base64" in parameters:
        content = _decode_base64(payload, name)
    else:
        content = unquote_to_bytes(payload.encode(errors="replace"))
    return content, content_type if _MEDIA_TYPE.fullmatch(content_type) else None


def looks_like_base64(source: str) -> bool:
    """Return whether a string, which no file has as its name, is base64 without "data:..."."""
    if _BASE64_OF_MEDIA.fullmatch(source):
        return True
    return len(source) > _MAX_FILE_NAME and _BASE64.fullmatch(source) is not None


def _decode_base64(payload: str, name: str) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError:  # whitespace or percent-encoding, which are rare and slow to remove
        text = unquote(payload).lstrip().rstrip("\r\n")
    # With the spaces it has the length of base64, which is a multiple of 4.
    if len(text) % 4 == 0 and _SPACES_WITHIN.fullmatch(text):
        raise InputError(
            f"{name}: the base64 of the data URL has spaces where it had '+'; write %2B in a query "
            "or form, or send it in JSON"
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name}: the data URL is not valid base64; encode it again") from error
