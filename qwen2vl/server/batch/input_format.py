"""Recognizes files that have the requests in another format than one JSON object a line.

Each line of such a file would be answered by an error. It is refused as a whole, before anything is
written, with the command that converts it: compressed files, UTF-16 and UTF-32, one JSON array of
all requests, and objects that are spread over several lines. JSON lines in UTF-8, with or without a
byte order mark, and with any line ends, pass.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from qwen2vl.errors import InputError

__all__ = ["check_format"]

HEAD_BYTES = 1 << 16

# First bytes -> format, and the command that converts a file {}.
_MAGIC = (
    (b"\x1f\x8b", "gzip", "gunzip -k {}"),
    (b"BZh", "bzip2", "bunzip2 -k {}"),
    (b"\xfd7zXZ\x00", "xz", "unxz -k {}"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd {}"),
    (b"PK\x03\x04", "a ZIP archive", "unzip {}"),
)
_ICONV = "iconv -f {} -t UTF-8 {} > requests-utf8.jsonl"
# The marks of UTF-32 come first: those of UTF-16 are their beginnings.
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_UTF8_MARK = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"\s*\[\s*\{")
_SPREAD_OBJECT = re.compile(rb'\s*\{[ \t]*\r?\n\s*"[^"\n]*"\s*:')


def check_format(path: Path, where: str) -> None:
    """Check that the first bytes of a file may be those of JSON lines.

    Args:
        path: of the file.
        where: names it in errors.

    Raises:
        InputError: it has another format; the text has the command that converts it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    found = _find_other_format(head, shlex.quote(str(path)))
    if found is not None:
        what, command = found
        raise InputError(f"{where}: is {what}, but requests are one JSON object a line; {command}")


def _find_other_format(head: bytes, path: str) -> tuple[str, str] | None:
    """Return the name of another format, and what to do."""
    for magic, name, command in _MAGIC:
        if head.startswith(magic):
            return name, f"unpack it: {command.format(path)}"
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            return name, f"convert it: {_ICONV.format(name, path)}"
    if b"\0" in head:
        return _describe_zeros(head, path)
    text = head.removeprefix(_UTF8_MARK)
    if _ARRAY.match(text):
        return "one JSON array", f"convert it: jq -c '.[]' {path} > requests-lines.jsonl"
    if _SPREAD_OBJECT.match(text):
        what = "JSON whose objects are spread over several lines"
        return what, f"convert it: jq -c . {path} > requests-lines.jsonl"
    return None


def _describe_zeros(head: bytes, path: str) -> tuple[str, str] | None:
    """Recognize UTF-16 without a mark: of the ASCII characters of JSON every second byte is 0."""
    for zeros, others, name in ((1, 0, "UTF-16LE"), (0, 1, "UTF-16BE")):
        if not any(head[zeros:16:2]) and all(head[others:16:2]):
            return name, f"convert it: {_ICONV.format(name, path)}"
    if head.lstrip(b" \t\r\n").startswith(b"{"):
        return None  # one line has a zero, and gets an error
    return "a binary file", "give the file of the requests"
