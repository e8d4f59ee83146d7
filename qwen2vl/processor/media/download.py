"""Read one http(s) URL into memory, within a byte cap and a deadline; standard library only.

Redirects stay on http and https: no other handler is installed, so that a picture's URL can never
open a local file. Which hosts may be reached is the caller's business: a server switches URLs off.
It must not know what the bytes mean. Called by media.py.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit, urlunsplit

from qwen2vl.errors import InputError

__all__ = ["download"]

_CHUNK = 1 << 18
_SAFE = "%/:=&?~+!$,;'@()*[]"  # what a URL that is already quoted may contain


def download(url: str, *, max_bytes: int, timeout: float, name: str) -> tuple[bytes, str | None]:
    """Fetch `url`; returns its bytes and the media type that the server declared.

    Raises:
        InputError: no answer, an error answer, too many bytes, or more than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    shown = url if len(url) <= 120 else url[:117] + "..."
    try:
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": "qwen2vl"})
        with _opener().open(request, timeout=timeout) as answer:
            content = _read(answer, max_bytes, deadline)
            return content, answer.headers.get_content_type()
    except urllib.error.HTTPError as error:
        text = f"the server answered {error.code} ({error.reason})"
        raise InputError(f"{name}: {text} for {shown}; check the URL") from error
    except _TooLargeError as error:
        text = f"{shown} has more than {max_bytes:,} bytes"
        raise InputError(f"{name}: {text}; send a smaller file") from error
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


def _read(answer: http.client.HTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """Read all, watching the clock between chunks: a socket's own time-out forgives a trickle."""
    content = bytearray()
    while chunk := answer.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise _TooLargeError
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:  # what the header promised and the connection did not bring
        raise http.client.IncompleteRead(bytes(content), answer.length)
    return bytes(content)


def _opener() -> urllib.request.OpenerDirector:
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
    """Percent-encode what people paste: spaces, letters beyond ASCII."""
    parts = urlsplit(url)
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    return urlunsplit((parts.scheme, host, quote(parts.path, _SAFE), quote(parts.query, _SAFE), ""))
