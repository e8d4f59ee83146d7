"""Downloads: byte limit, deadline, redirects (never to a local file), and errors."""

from __future__ import annotations

import contextlib
import gzip
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media.download import download
from qwen2vl.processor.media.source import DEFAULT_LIMITS, Media, read_source
from tests.media import encoded, smooth

PNG = encoded(smooth(20, 30))
GZIP, ZLIB = gzip.compress(PNG), zlib.compress(PNG)
ENCODED = {
    "/gzip": (GZIP, "gzip"),
    "/x-gzip": (GZIP, "X-GZip"),
    "/members": (gzip.compress(PNG[:50]) + gzip.compress(PNG[50:]), "gzip"),
    "/deflate": (ZLIB, "deflate"),
    "/raw": (ZLIB[2:-4], "deflate"),
    "/identity": (PNG, "identity"),
    "/bomb": (gzip.compress(bytes(10**7)), "gzip"),
    "/empty": (gzip.compress(b"") * 75_000, "gzip"),  # 1.5 MB, which take seconds
    "/cut": (GZIP[:-20], "gzip"),
    "/false": (PNG, "gzip"),
    "/zstd": (PNG, "zstd"),
}


class _Handler(BaseHTTPRequestHandler):
    """Serves an image, redirects, and responses that are too large, too slow or too short."""

    REDIRECTS: ClassVar[dict[str, str]] = {
        "/moved": "/image",
        "/inside": "file:///image.png",
        "/ftp": "ftp://localhost/image",
    }

    def do_GET(self) -> None:
        if self.path in self.REDIRECTS:
            self.send_response(302)
            self.send_header("Location", self.REDIRECTS[self.path])
            self.end_headers()
        elif self.path in ("/image", "/caf%C3%A9%20x?q=%C3%A9"):
            self._answer([PNG])
        elif self.path in ENCODED:
            content, encoding = ENCODED[self.path]
            self._answer([content], encoding=encoding)
        elif self.path == "/endless":
            self._answer([bytes(65536)] * 1000)
        elif self.path == "/slow":
            self._answer([b"x"] * 100, pause=0.05)
        elif self.path == "/short":
            self._answer([PNG], length=len(PNG) + 10)
        else:
            self.send_error(404)

    def _answer(
        self,
        parts: list[bytes],
        pause: float = 0.0,
        length: int | None = None,
        encoding: str | None = None,
    ) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        if encoding is not None:
            self.send_header("Content-Encoding", encoding)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client closes some connections early
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(pause)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield from _run_server()


def _run_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", ["image", "moved", "caf\u00e9 x?q=\u00e9"])
def test_downloaded_content_and_type(server_url: str, page: str) -> None:
    got = download(f"{server_url}/{page}", max_bytes=100_000, timeout=10, name="image 1")
    assert got == (PNG, "image/png")


@pytest.mark.parametrize("page", ["gzip", "x-gzip", "members", "deflate", "raw", "identity"])
def test_content_encodings_are_decoded(server_url: str, page: str) -> None:
    """Storage sends an object as it was stored, though identity is asked for."""
    got = download(f"{server_url}/{page}", max_bytes=2 * len(PNG), timeout=10, name="image 1")
    assert got == (PNG, "image/png")


def test_a_url_is_a_source(server_url: str) -> None:
    media = read_source(f"{server_url}/image", DEFAULT_LIMITS, "image 1")
    assert media == Media(content=PNG, content_type="image/png")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("gone", "image 1: the server answered 404"),
        ("inside", "cannot reach|cannot read|answered 302"),
        ("ftp", "cannot reach|cannot read|answered 302"),
        ("endless", "has more than 100,000 bytes; send a smaller file"),
        ("slow", "did not arrive in 0.5 s"),
        ("short", "cannot read"),
        ("bomb", "has more than 100,000 bytes; send a smaller file"),
        ("cut", "was sent with Content-Encoding 'gzip', and ends early; save it to a file first"),
        ("false", "was sent with Content-Encoding 'gzip', but is not; save it to"),
        ("zstd", "was sent with Content-Encoding 'zstd', not gzip or deflate; save"),
    ],
)
def test_failing_downloads(server_url: str, page: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        download(f"{server_url}/{page}", max_bytes=100_000, timeout=0.5, name="image 1")


def test_the_deadline_holds_while_members_are_decoded(server_url: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=r"did not arrive in 0.5 s; try again"):
        download(f"{server_url}/empty", max_bytes=10**7, timeout=0.5, name="image 1")
    assert time.monotonic() - start < 1.5


def test_unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match=r"image 1: cannot reach http://127.0.0.1:9/a; check the"):
        download("http://127.0.0.1:9/a", max_bytes=1, timeout=1, name="image 1")
