"""Strict JSON: UTF-8 only, no duplicate keys, NaN or lone surrogates; limited depth and size.

Parsers differ in what they make of duplicate keys or NaN, and nested or many small values cost far
more memory than their bytes; both are refused with the position or the number. (RFC 8259, I-JSON:
RFC 7493.)
"""

from __future__ import annotations

import json
import math
from typing import Any

from qwen2vl.errors import abbreviate
from qwen2vl.server.errors import APIError

__all__ = ["is_costly", "parse_json"]

MAX_VALUES = 500_000  # numbers, strings, lists and objects of a body
SCANNED_BYTES = 500_000  # a body below it cannot hold more values than that
MAX_KEYS = 10_000  # of one object; no field takes as many
MAX_DIGITS = 400  # of a number; no field takes one as long
SEPARATORS = (b",", b"[", b"{", b":")
# A body of fewer bytes, or of fewer values and not too many bytes, takes below 5 ms.
CHEAP_BYTES, CHEAP_VALUES, MAX_CHEAP_BYTES = 16_384, 4_000, 4_000_000


class _RefusalError(ValueError):
    """What the parser's hooks refuse; the text is for the client."""


def is_costly(body: bytes) -> bool:
    """Return whether parsing a body would hold up an event loop."""
    if len(body) < CHEAP_BYTES:
        return False
    return len(body) > MAX_CHEAP_BYTES or _count_values(body) > CHEAP_VALUES


def _count_values(body: bytes) -> int:
    return sum(body.count(separator) for separator in SEPARATORS)


def parse_json(body: bytes, *, max_depth: int, where: str | None = None) -> Any:
    """Parse a JSON request body, or a line of a file.

    Args:
        body: the bytes as sent.
        max_depth: how deep lists and objects may be nested.
        where: names the line in errors, such as "line 7"; None: it is a request body.

    Raises:
        APIError: 400: not JSON in UTF-8, a key given twice, NaN or Infinity, a lone surrogate,
            nested too deeply, or too many values.
    """
    try:
        if len(body) > SCANNED_BYTES and _count_values(body) > MAX_VALUES:
            raise _RefusalError(f"holds more than {MAX_VALUES:,} values; send fewer")
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
        )
        _check_values(value, max_depth)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte {error.start} is invalid"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if where is None else ""
        what = f"is not JSON: error at {line}column {error.colno}"
    except _RefusalError as error:
        what = str(error)
    except RecursionError:
        what = _too_deep(max_depth)
    else:
        return value
    raise APIError(400, f"{where or 'the request body'} {what}", code="invalid_json")


def _too_deep(max_depth: int) -> str:
    return f"nests lists and objects more than {max_depth} deep; make it flatter"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise _RefusalError(
            f"holds an object of {len(pairs):,} keys, the limit is {MAX_KEYS:,}; send fewer"
        )
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _RefusalError(f"gives the key {abbreviate(twice)} twice in one object; give it once")
    return value


def _refuse_constant(name: str) -> Any:
    raise _RefusalError(f"holds {name}, which is not JSON; give a finite number")


def _float(text: str) -> float:
    if len(text) > MAX_DIGITS or not math.isfinite(value := float(text)):
        raise _RefusalError(f"holds the number {abbreviate(text)}, which no field takes")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _RefusalError(f"holds the number {abbreviate(text)}, which no field takes")
    return int(text)


def _check_values(root: Any, max_depth: int) -> None:
    """Check depth and strings level by level, without recursion."""
    level, depth = [root], 0
    while level:
        inner: list[Any] = []
        is_nested = False
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                is_nested = True
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                is_nested = True
                inner += value
        depth += is_nested
        if depth > max_depth:
            raise _RefusalError(_too_deep(max_depth))
        level = inner


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()  # ten times as fast as a search
    except UnicodeEncodeError as error:
        raise _RefusalError(
            f"holds a lone surrogate (\\u{ord(text[error.start]):x}), which is no character; send "
            "a pair or the character itself"
        ) from None
