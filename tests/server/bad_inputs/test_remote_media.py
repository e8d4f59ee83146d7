"""URLs of every kind: what the server may fetch and read, and how remote failures are told."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from qwen2vl.server.app import create_app
from tests.media import encoded, smooth
from tests.server.bad_inputs.suite import FIRST, Suite, covers, data_url, image_item, text_item
from tests.server.media.evil_server import EvilServer

PICTURE = encoded(smooth(56, 56))
PARAM = "messages[0].content[1]"


@pytest.fixture(scope="module")
def evil() -> Iterator[EvilServer]:
    """Give a server of good and bad files."""
    with EvilServer({"/a.png": PICTURE}) as server:
        yield server


@pytest.fixture(scope="module")
def media_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of files, with another one beside it."""
    root = tmp_path_factory.mktemp("media")
    (root / "tmp").mkdir()
    (root / "tm").mkdir()
    for path in ("tmp/a b%.png", "tmp/a.png", "tm/a.png", "secret.png"):
        (root / path).write_bytes(PICTURE)
    (root / "tmp" / "out.png").symlink_to(root / "secret.png")
    (root / "tmp" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "tmp" / "pipe.png")
    with (root / "tmp" / "huge.png").open("wb") as file:
        file.truncate(21_000_000)
    return root / "tmp"


@pytest.fixture
def open_suite(
    evil: EvilServer, media_root: Path, make_state: Callable[..., Any]
) -> Iterator[Suite]:
    """Give an application that may fetch from the evil server, and read the folder."""
    state = make_state(
        allowed_media_domains=(f"127.0.0.1:{evil.port}", "example.com"),
        allowed_local_media_path=media_root,
        media_fetch_timeout=0.5,
        max_image_bytes=20_000_000,
    )
    with TestClient(create_app(state), base_url="http://127.0.0.1:8000") as client:
        yield Suite(client)


def refused(suite: Suite, url: str, status: int = 400, text: str = "") -> dict[str, Any]:
    return suite.refused([text_item("x"), image_item(url)], status, text, param=PARAM)


@covers(
    "http(s) URL while remote fetch disabled (default)",
    "URL to 127.0.0.1, ::1, 10/8, 192.168/16, 169.254.169.254, 0.0.0.0",
)
def test_remote_media_are_off(
    suite: Suite, evil: EvilServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[str] = []
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: (lookups.append(host), real(host, *a, **k))[1]
    )
    before = evil.connections
    for url in (evil.url("/a.png"), evil.url("/a.png", "localhost"), "https://example.com/a.png"):
        refused(suite, url, text="--allowed-media-domains")
    assert evil.connections == before and not lookups


@covers(
    "URL to 127.0.0.1, ::1, 10/8, 192.168/16, 169.254.169.254, 0.0.0.0",
    "decimal/octal/hex/v4-mapped/6to4 host forms",
    "backslash-@ / userinfo / unicode host parser differential",
)
@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.2", "[::1]", "10.0.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"]
    + ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "[2002:7f00:1::]"]
    + ["[64:ff9b::7f00:1]", "127.0.0.1\\@example.com", "example.com\\@127.0.0.1"]
    + ["user@127.0.0.1", "example.com@127.0.0.1", "127.0.0.1%00.example.com", "ⓛocalhost"]
    + ["example.com\u3002evil.test", "127\u30020.0.1", "example.com%2f@127.0.0.1"],
)
def test_hosts_that_are_not_allowed(open_suite: Suite, evil: EvilServer, host: str) -> None:
    before = evil.connections
    refused(open_suite, f"http://{host}:{evil.port}/a.png")
    refused(open_suite, f"http://{host}/a.png")
    assert evil.connections == before


@covers("redirect from public/allowed host to loopback or other host")
def test_redirects(open_suite: Suite, evil: EvilServer) -> None:
    open_suite.accepted([image_item(evil.url("/redirect?/a.png")), text_item("x")])
    with EvilServer({"/a.png": PICTURE}) as inner:
        for target in (inner.url("/a.png"), inner.url("/a.png", "localhost"), "file:///etc/passwd"):
            refused(open_suite, evil.url(f"/redirect?{quote(target)}"))
        assert inner.connections == 0


@covers("DNS rebinding (public then private answer)")
def test_rebinding(open_suite: Suite, evil: EvilServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name whose address is private is refused; the second answer is never asked for.

    tests/server/media/test_fetch.py shows that the connection goes to the checked address.
    """
    connector = open_suite.client.app.state.server.connector
    answers = iter([["127.0.0.1"], ["8.8.8.8"]])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(connector._fetcher, "_resolver", resolve)
    before = evil.connections
    refused(open_suite, "http://example.com/a.png", text="address that is not public")
    assert evil.connections == before
    assert next(answers) == ["8.8.8.8"]


@covers("gopher:, ftp:, file:, blob:, javascript: schemes")
@pytest.mark.parametrize(
    "url",
    ["gopher://x/1", "ftp://example.com/a.png", "file:/etc/passwd", "blob:http://x/1", "a.png"]
    + ["javascript:alert(1)", "/etc/passwd", "ws://example.com/", "", "\0", "../secret.png"],
)
def test_other_schemes(suite: Suite, open_suite: Suite, url: str) -> None:
    text = "not a URL|is empty|URLs are not read|three slashes"
    for one in (suite, open_suite):
        assert refused(one, url, text=text)["code"] == "invalid_url"


@covers("endless body / slow drip 1 B/s / wrong Content-Length / gzip bomb response")
@pytest.mark.parametrize(
    ("path", "status"),
    [("/endless", 400), ("/endless-chunked", 400), ("/endless-headers", 400), ("/too-short", 400)]
    + [("/declares-much", 400), ("/gzip", 400), ("/garbage", 400), ("/drip", 408), ("/hang", 408)],
)
def test_evil_responses(open_suite: Suite, evil: EvilServer, path: str, status: int) -> None:
    refused(open_suite, evil.url(path), status)


@covers("image link in Markdown inside the prompt text")
def test_links_in_text_are_not_fetched(open_suite: Suite, evil: EvilServer) -> None:
    before = evil.connections
    text = f"![x]({evil.url('/a.png')}) <img src='{evil.url('/a.png')}'> {evil.url('/a.png')}"
    assert open_suite.accepted(text).media == []
    assert evil.connections == before


@covers("remote 404/403", "remote 500 or DNS failure")
@pytest.mark.parametrize(("path", "status"), [("/404", 422), ("/403", 422), ("/500", 502)])
def test_remote_errors(open_suite: Suite, evil: EvilServer, path: str, status: int) -> None:
    error = refused(open_suite, evil.url(path), status, text="the remote server answered")
    assert "secret" not in error["message"].lower()


@covers("remote 500 or DNS failure")
def test_dns_failure(open_suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    connector = open_suite.client.app.state.server.connector
    monkeypatch.setattr(connector._fetcher, "_resolver", resolve)
    refused(open_suite, "http://example.com/a.png", 502, text="has no address; try again")


@covers("file:// without permission flag")
def test_files_are_off(suite: Suite, media_root: Path) -> None:
    for url in (f"file://{media_root}/a.png", "file:///etc/passwd", "file:///does/not/exist"):
        refused(suite, url, text="--allowed-local-media-path")


@covers(
    "file:// with .., prefix dir trick ./tm vs ./tmp, symlink out, absolute outside",
    "file:// to FIFO, /dev/zero, directory, huge file",
)
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/../secret.png", "not under --allowed-local-media-path"),
        ("/%2e%2e/secret.png", "not under --allowed-local-media-path"),
        ("/../tm/a.png", "not under --allowed-local-media-path"),
        ("/out.png", "not under --allowed-local-media-path"),
        ("/zero.png", "not under --allowed-local-media-path"),
        ("", "not under --allowed-local-media-path"),
        ("/pipe.png", "cannot be read"),
        ("/missing.png", "does not exist"),
        ("/huge.png", "21,000,000 bytes, the limit is 20,000,000"),
    ],
)
def test_files_that_are_refused(open_suite: Suite, media_root: Path, path: str, text: str) -> None:
    error = refused(open_suite, f"file://{media_root}{path}", text=text)
    assert "secret" not in error["message"]


@covers("file:// with .., prefix dir trick ./tm vs ./tmp, symlink out, absolute outside")
def test_absolute_paths_outside(open_suite: Suite, media_root: Path) -> None:
    for path in ("/etc/passwd", "/dev/zero", str(media_root.parent / "tm" / "a.png"), "/no/such"):
        refused(open_suite, f"file://{path}", text="not under --allowed-local-media-path")


@covers("file:// name with spaces or percent escapes")
def test_odd_file_names(open_suite: Suite, media_root: Path) -> None:
    plain = open_suite.accepted([image_item(f"file://{media_root}/a.png"), text_item("x")])
    for name in ("a%20b%25.png", "a b%25.png"):
        sent = open_suite.accepted([image_item(f"file://{media_root}/{name}"), text_item("x")])
        assert sent.answer == plain.answer


@covers(
    "base64 garbage / wrong alphabet / bad padding",
    "data URL without comma; non-base64; upper-case BASE64; space after ;",
)
@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,@@@", "data:image/png;base64,AAA", "data:image/png;base64,A"]
    + [
        "data:image/png;base64,_-_-",
        "data:image/png;base64,\u00e9",
    ]
    + ["data:image/png;base64", "data:image/png,AAAA", "data:image/png;BASE64,AAAA", "data:"]
    + ["data:image/png; base64,AAAA", "data:,", "data:image/png;base64;AAAA"],
)
def test_malformed_data_urls(suite: Suite, url: str) -> None:
    refused(suite, url, text="base64|data:image/png;base64")


@covers("data URL larger than the limit")
def test_large_data_url(suite: Suite, make_state: Callable[..., Any]) -> None:
    app = create_app(make_state(max_image_bytes=1_000_000))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        url = data_url(bytes(1_000_010))
        error = Suite(client).refused([image_item(url)], 413, "limit is 1,000,000 bytes")
    assert error["param"] == FIRST and error["code"] == "media_too_large"
    assert "damaged" in suite.refused([image_item(PICTURE[:-100])])["message"]


@covers("error text leaks heap address / path / base64")
def test_errors_do_not_leak(suite: Suite) -> None:
    """`Suite.refused` checks every refusal of these tests; here, one whose input is echoable."""
    for source in (b"\x89PNG\r\n\x1a\n" + bytes(100), b"BM" + b"\xff" * 300, b"GIF89a" + bytes(9)):
        message = suite.refused([image_item(source)])["message"]
        assert data_url(source)[30:60] not in message
