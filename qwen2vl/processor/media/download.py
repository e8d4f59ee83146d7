"""Download of one http(s) URL into memory, with a byte limit and a deadline; standard library only.

Redirects stay on http and https: no other handler is installed, so that the URL of an image can
never open a local file (no SSRF to file://). Hosts are not filtered here: a server that must not
fetch URLs disables them (`MediaLimits.allow_urls`). Content-Encoding gzip and deflate are decoded:
they are not asked for, but storage sends objects as they were stored. (requests: Response.content.)
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
import zlib
from urllib.parse import quote, urlsplit, urlunsplit

from qwen2vl.errors import InputError, MediaTooLargeError

__all__ = ["download"]

_CHUNK = 1 << 18
_GZIP_OR_ZLIB, _RAW_DEFLATE = 32 + zlib.MAX_WBITS, -zlib.MAX_WBITS
_SAFE = "%/:=&?~+!$,;'@()*[]"  # characters left as they are when a URL is percent-encoded


def download(url: str, *, max_bytes: int, timeout: float, name: str) -> tuple[bytes, str | None]:
    """Fetch `url`; return its bytes and the media type that the server declared.

    Raises:
        InputError: no response, an error status, more than `max_bytes` as sent or decoded, an
            unknown or damaged Content-Encoding, or `timeout` seconds exceeded.
    """
    deadline = time.monotonic() + timeout
    shown = url if len(url) <= 120 else url[:117] + "..."
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": "qwen2vl"})
        with _http_opener().open(request, timeout=timeout) as response:
            content = _read_all(response, max_bytes, deadline)
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            content = _decode_content(content, encoding, max_bytes, deadline)
            return content, response.headers.get_content_type()
    except urllib.error.HTTPError as error:
        text = f"the server answered {error.code} ({error.reason})"
        raise InputError(f"{name}: {text} for {shown}; check the URL") from error
    except _TooLargeError as error:
        text = f"{shown} has more than {max_bytes:,} bytes"
        raise MediaTooLargeError(f"{name}: {text}; send a smaller file") from error
    except _EncodingError as error:
        text = f"{name}: {shown} was sent with Content-Encoding {error}"
        raise InputError(f"{text}; save it to a file first") from error
    except TimeoutError as error:
        raise InputError(f"{name}: {shown} did not arrive in {timeout:g} s; try again") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            text = f"{shown} did not answer in {timeout:g} s; try again"
            raise InputError(f"{name}: {text}") from error
        raise InputError(f"{name}: cannot reach {shown}; check the URL") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"{name}: cannot read {shown}; check the URL") from error


class _TooLargeError(Exception):
    pass


class _EncodingError(Exception):
    """A Content-Encoding that cannot be decoded."""


def _read_all(response: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """Read all, checking the deadline after each chunk: a socket timeout restarts with each one."""
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise _TooLargeError
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # bytes of Content-Length that were not received
        raise http.client.IncompleteRead(bytes(content), response.length)
    return bytes(content)


def _decode_content(content: bytes, encoding: str, max_bytes: int, deadline: float) -> bytes:
    """Decode a Content-Encoding, never to more than a byte above `max_bytes`.

    zlib copies what follows each member of gzip, so that a megabyte of empty ones takes seconds.
    """
    if encoding in ("", "identity"):
        return content
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise _EncodingError(f"{encoding[:40]!r}, not gzip or deflate")
    # Some servers send deflate without the header of zlib; that of zlib is a multiple of 31.
    is_raw = encoding == "deflate" and int.from_bytes(content[:2], "big") % 31 != 0
    decoded = bytearray()
    while content:  # gzip may have several members
        decoder = zlib.decompressobj(_RAW_DEFLATE if is_raw else _GZIP_OR_ZLIB)
        try:
            decoded += decoder.decompress(content, max_bytes + 1 - len(decoded))
        except zlib.error as error:
            raise _EncodingError(f"{encoding!r}, but is not") from error
        if len(decoded) > max_bytes:
            raise _TooLargeError
        if not decoder.eof:
            raise _EncodingError(f"{encoding!r}, and ends early")
        if time.monotonic() > deadline:
            raise TimeoutError
        content = decoder.unused_data.lstrip(b"\0")
    return bytes(decoded)


def _http_opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _quoted(url: str) -> str:
    """Percent-encode spaces and non-ASCII characters; other URLs are unchanged."""
    parts = urlsplit(url)
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    return urlunsplit((parts.scheme, host, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))
