"""Text files of rows: JSON lines and JSON lists, as editors and spreadsheets write them.

A byte order mark at the start of a file is skipped, line ends may be those of Windows, and a file
that is one JSON list, in whichever layout, is converted to lines in the cache. Files in UTF-16 and
UTF-32 are refused: offsets of lines are found by bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen2vl.errors import InputError
from qwen2vl.files import atomic_file, touch

__all__ = ["index_lines", "list_to_lines"]

READ_CHUNK = 1 << 24  # bytes
MAX_BLANK_BYTES = 32  # of a line that is read to see whether it is blank
_LIST = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*(?:[{\]]|\Z)")  # of rows; the head may end in spaces
_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{")
_GZIP_MAGIC = b"\x1f\x8b"
HEAD_BYTES = 64  # of a file, in which its encoding and its first character are found


def list_to_lines(path: Path, cache_dir: Path) -> Path:
    """Convert a file that is one JSON list, or one object of several lines, to lines.

    Returns:
        The converted file in the cache, or `path` if the file has lines.

    Raises:
        InputError: the file is missing, not in UTF-8, or a list that is not valid JSON.
    """
    try:
        info = path.stat()
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            _check_encoding(head, path)
            is_list = bool(_LIST.match(head))
            is_object = path.suffix == ".json" and bool(_OBJECT.match(head))
            file.seek(0)
            if not is_list and not (is_object and not _is_json(file.readline())):
                return path
    except OSError as error:
        raise InputError(f"{path}: no such file, or no permission; check the path") from error
    key = blake2b(f"{path.resolve()} {info.st_size} {info.st_mtime_ns}".encode(), digest_size=8)
    target = cache_dir / "text" / f"{key.hexdigest()}-{path.stem}.jsonl"
    if touch(target):
        return target
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if is_object or _second_line_is_json(path):
            return path  # lines, the first of which is bad
        raise InputError(f"{path} is not JSON: {error}; is it cut short?") from error
    with atomic_file(target) as partial, partial.open("wb") as file:
        rows = rows if isinstance(rows, list) else [rows]
        file.writelines(f"{json.dumps(row)}\n".encode() for row in rows)
    return target


def index_lines(path: Path, digest: Any) -> np.ndarray:
    """Return (line number, start, end) in bytes of all lines that are not blank; update `digest`.

    Raises:
        InputError: the file is missing, or not in UTF-8.
    """
    ends = [np.zeros(1, np.int64)]
    size = start = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(READ_CHUNK):
                if not size:
                    _check_encoding(chunk[:HEAD_BYTES], path)
                    start = len(codecs.BOM_UTF8) if chunk.startswith(codecs.BOM_UTF8) else 0
                digest.update(chunk)
                newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                ends.append(newlines + size + 1)
                size += len(chunk)
            bounds = np.concatenate([*ends, np.array([size])])
            bounds[0] = start
            spans = np.stack((np.arange(1, len(bounds)), bounds[:-1], bounds[1:]), axis=1)
            is_blank = [_is_blank(file, *span) for span in spans[:, 1:].tolist()]
    except OSError as error:
        raise InputError(f"{path}: no such file, or no permission; check the path") from error
    return spans[~np.array(is_blank)]


def _is_blank(file: BinaryIO, start: int, end: int) -> bool:
    if end - start > MAX_BLANK_BYTES:
        return False
    file.seek(start)
    return not file.read(end - start).strip()


def _check_encoding(head: bytes, path: Path) -> None:
    if head.startswith(_GZIP_MAGIC):
        raise InputError(
            f"{path} is compressed with gzip: unpack it, as "
            f"`gunzip < {path.name} > unpacked{path.suffix}`"
        )
    encoding = _wide_encoding(head)
    if encoding:
        raise InputError(
            f"{path} is in {encoding}, and must be in UTF-8: save it so, or run "
            f"`iconv -f {encoding} -t UTF-8 {path.name} > converted{path.suffix}`"
        )


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 by its byte order mark, else by the zeros of ASCII; None: neither."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}  # before UTF-16's
    marks |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    for mark, encoding in marks.items():
        if head.startswith(mark):
            return encoding
    zeros = tuple(byte == 0 for byte in head[:4])
    if not any(zeros):
        return None
    width = 32 if sum(zeros) > 2 else 16
    return f"UTF-{width}{'BE' if zeros[0] else 'LE'}"


def _second_line_is_json(path: Path) -> bool:
    with path.open("rb") as file:
        file.readline()
        return _is_json(file.readline())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True
