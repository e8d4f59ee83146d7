"""Fetches from servers that misbehave: addresses, redirects, limits, deadlines, cancellation."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.server.errors import APIError
from qwen2vl.server.media import fetch as fetch_module
from qwen2vl.server.media.addresses import AllowedHosts
from qwen2vl.server.media.fetch import MediaFetcher
from tests.server.media.evil_server import EvilServer

NAME = "messages[0].content[1]"
LOOPBACK = "127.0.0.0/8"


class StubResolver:
    """Stands in for getaddrinfo: host -> one list of addresses per call; the last one repeats."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {host.replace("_", "."): list(lists) for host, lists in answers.items()}
        self.calls: list[str] = []

    def __call__(self, host: str, port: int, **_: Any) -> list[Any]:
        self.calls.append(host)
        lists = self.answers.get(host)
        if lists is None:
            raise socket.gaierror(socket.EAI_NONAME, "secret resolver text")
        addresses = lists.pop(0) if len(lists) > 1 else lists[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]


@pytest.fixture(scope="module")
def evil() -> Iterator[EvilServer]:
    with EvilServer({"/a.png": b"picture", "/big": bytes(10_000)}) as server:
        yield server


def fetch(
    url: str,
    entries: Sequence[str],
    resolver: Callable[..., Any] = socket.getaddrinfo,
    *,
    max_bytes: int = 1000,
    timeout: float = 5.0,
    context: ssl.SSLContext | None = None,
) -> bytes:
    async def run() -> bytes:
        fetcher = MediaFetcher(AllowedHosts(entries), resolver=resolver, ssl_context=context)
        try:
            return await fetcher.fetch(
                url, NAME, max_bytes=max_bytes, on_bytes=lambda _: None, timeout=timeout
            )
        finally:
            fetcher.close()

    return asyncio.run(run())


def refusal(*args: Any, **options: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        fetch(*args, **options)
    error = caught.value
    assert error.param == NAME and error.message.startswith(f"{NAME}: ")
    for leak in ("secret", "127.0.0.1", "Traceback", "httpcore", "Errno", "0x"):
        assert leak not in error.message
    assert (error.type == "server_error") == (error.status >= 500)
    return error


# Which address is contacted ----------------------------------------------------------------------


def test_fetches_from_an_allowed_host_with_its_name(evil: EvilServer) -> None:
    resolver = StubResolver(media_test=[["127.0.0.1"]])
    url = evil.url("/a.png", "Media.TEST")
    assert fetch(url, [f"media.test:{evil.port}={LOOPBACK}"], resolver) == b"picture"
    headers = evil.hits[-1].headers
    assert headers["host"] == f"media.test:{evil.port}"
    assert headers["accept-encoding"] == "identity"
    assert "cookie" not in headers and "authorization" not in headers
    assert resolver.calls == ["media.test"]


def test_fetches_from_an_allowed_address(evil: EvilServer) -> None:
    assert fetch(evil.url("/a.png"), [f"127.0.0.1:{evil.port}"]) == b"picture"


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["0.0.0.0"], ["::1"], ["::ffff:127.0.0.1"]]
    + [
        ["64:ff9b::7f00:1"],
        ["2002:7f00:1::"],
        ["100.64.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["fe80::1%1"],
    ],
)
def test_host_with_an_address_that_is_not_public(evil: EvilServer, addresses: list[str]) -> None:
    before = evil.connections
    resolver = StubResolver(media_test=[addresses])
    error = refusal(evil.url("/a.png", "media.test"), [f"media.test:{evil.port}"], resolver)
    assert (error.status, error.code) == (400, "media_not_allowed")
    assert evil.connections == before


def test_network_of_another_host_does_not_count(evil: EvilServer) -> None:
    entries = [f"media.test:{evil.port}", f"other.test:{evil.port}={LOOPBACK}", "127.0.0.1"]
    resolver = StubResolver(media_test=[["127.0.0.1"]])
    error = refusal(evil.url("/a.png", "media.test"), entries, resolver)
    assert error.code == "media_not_allowed"


def test_dns_rebinding_connects_to_the_checked_address_only(
    evil: EvilServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str] = []

    async def connect(self: Any, host: str, port: int, *_: Any, **__: Any) -> Any:
        connected.append(host)
        raise fetch_module.httpcore2.ConnectError("secret")

    monkeypatch.setattr(fetch_module.httpcore2.AnyIOBackend, "connect_tcp", connect)
    before = evil.connections
    resolver = StubResolver(media_test=[["8.8.8.8", "8.8.4.4"], ["127.0.0.1"]])
    error = refusal(evil.url("/a.png", "media.test"), [f"media.test:{evil.port}"], resolver)
    assert error.status == 502
    assert connected == ["8.8.8.8", "8.8.4.4"]
    assert resolver.calls == ["media.test"] and evil.connections == before


def test_second_address_is_tried_if_the_first_refuses(evil: EvilServer) -> None:
    resolver = StubResolver(media_test=[["127.0.0.9", "127.0.0.1"]])
    entries = [f"media.test:{evil.port}={LOOPBACK}"]
    assert fetch(evil.url("/a.png", "media.test"), entries, resolver) == b"picture"


def test_proxies_of_the_environment_are_not_used(
    evil: EvilServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetch(evil.url("/a.png"), [f"127.0.0.1:{evil.port}"]) == b"picture"


def test_no_answer_of_the_resolver_is_retryable(evil: EvilServer) -> None:
    for resolver in (StubResolver(), StubResolver(media_test=[[]])):
        error = refusal(
            evil.url("/a.png", "media.test"), ["media.test:" + str(evil.port)], resolver
        )
        assert (error.status, error.retry_after) == (502, 1.0)


def test_resolver_that_hangs_ends_at_the_deadline(evil: EvilServer) -> None:
    release = threading.Event()
    try:
        entries = [f"media.test:{evil.port}"]
        error = refusal(
            evil.url("/", "media.test"), entries, lambda *_, **__: release.wait(30), timeout=0.2
        )
        assert (error.status, error.code) == (408, "media_timeout")
    finally:
        release.set()


def test_port_without_a_listener_is_retryable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    assert refusal(f"http://127.0.0.1:{port}/", [f"127.0.0.1:{port}"]).status == 502


# Redirects ---------------------------------------------------------------------------------------


def test_redirects_are_followed_and_cookies_are_not_sent(evil: EvilServer) -> None:
    url = evil.url("/redirect?/redirect%3F/redirect%253F/a.png")
    assert fetch(url, [f"127.0.0.1:{evil.port}"]) == b"picture"
    assert "cookie" not in evil.hits[-1].headers


def test_more_than_three_redirects(evil: EvilServer) -> None:
    loop = evil.url("/redirect?/redirect%3F/redirect%253F/redirect%25253F/a.png")
    error = refusal(loop, [f"127.0.0.1:{evil.port}"])
    assert error.status == 422 and "more than 3 times" in error.message


@pytest.mark.parametrize(
    "target",
    ["http://localhost:{port}/a.png", "http://private.test:{port}/a.png", "http://[::1]:{port}/"]
    + ["http://user@127.0.0.1:{port}/", "//localhost:{port}/a.png", "http://127.0.0.1:1/"]
    + ["http://2130706433:{port}/", "file:///etc/passwd", "gopher://x/", "ftp://127.0.0.1/"]
    + ["/\\localhost:{port}/a.png", "http://127.0.0.1:{port}\\@localhost/", "", "http://\xe9/"],
)
def test_redirect_elsewhere_is_not_followed(target: str) -> None:
    with EvilServer() as evil:
        resolver = StubResolver(
            public_test=[["127.0.0.1"]], private_test=[["127.0.0.2"]], localhost=[["127.0.0.1"]]
        )
        entries = [f"public.test:{evil.port}=127.0.0.1", f"private.test:{evil.port}"]
        location = target.format(port=evil.port)
        url = evil.url(f"/redirect?{_quote(location)}", "public.test")
        error = refusal(url, entries, resolver)
        assert error.status in (400, 422)
        assert evil.connections == 1


def _quote(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


def test_redirect_resolves_and_checks_again() -> None:
    with EvilServer({"/a.png": b"x"}) as evil:
        resolver = StubResolver(media_test=[["127.0.0.1"], ["127.0.0.2"]])
        entries = [f"media.test:{evil.port}=127.0.0.1"]
        error = refusal(evil.url("/redirect?/a.png", "media.test"), entries, resolver)
        assert error.code == "media_not_allowed" and evil.connections == 1
        assert resolver.calls == ["media.test", "media.test"]


# Responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/403", 422, "answered 403; check the URL"),
        ("/404", 422, "answered 404; check the URL"),
        ("/204", 422, "answered 204"),
        ("/switch", 400, "malformed or ends too early"),
        ("/429", 502, "answered 429; try again later"),
        ("/500", 502, "answered 500; try again later"),
        ("/endless", 400, "more than 1,000 bytes"),
        ("/endless-chunked", 400, "more than 1,000 bytes"),
        ("/endless-headers", 400, "malformed or ends too early"),
        ("/declares-much", 400, "more than 1,000 bytes"),
        ("/big", 400, "more than 1,000 bytes"),
        ("/too-short", 400, "malformed or ends too early"),
        ("/garbage", 400, "malformed or ends too early"),
        ("/silent", 400, "malformed or ends too early"),
        ("/gzip", 400, "compressed its response"),
        ("/no-location", 422, "redirects to an invalid URL"),
    ],
)
def test_bad_response(evil: EvilServer, path: str, status: int, text: str) -> None:
    error = refusal(evil.url(path), [f"127.0.0.1:{evil.port}"])
    assert error.status == status and text in error.message


def test_bytes_after_the_declared_length_are_not_read(evil: EvilServer) -> None:
    assert fetch(evil.url("/too-long"), [f"127.0.0.1:{evil.port}"]) == b"abc"


def test_body_of_exactly_the_limit(evil: EvilServer) -> None:
    entries = [f"127.0.0.1:{evil.port}"]
    assert len(fetch(evil.url("/big"), entries, max_bytes=10_000)) == 10_000
    assert refusal(evil.url("/big"), entries, max_bytes=9_999).code == "media_too_large"


@pytest.mark.parametrize("path", ["/drip", "/hang", "/endless-informational"])
def test_slow_response_ends_at_the_deadline(evil: EvilServer, path: str) -> None:
    start = time.monotonic()
    error = refusal(evil.url(path), [f"127.0.0.1:{evil.port}"], timeout=0.3)
    assert (error.status, error.code) == (408, "media_timeout")
    assert time.monotonic() - start < 3.0
    wait_until(lambda: evil.open_connections == 0)


def test_server_that_never_accepts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_CONNECT_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        pending = [socket.socket() for _ in range(4)]
        for waiting in pending:  # fill the backlog: further SYNs are dropped
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        error = refusal(f"http://127.0.0.1:{port}/", [f"127.0.0.1:{port}"], timeout=3.0)
        assert (error.status, error.code) == (408, "media_timeout")
        for waiting in pending:
            waiting.close()


def test_cancellation_closes_the_socket(evil: EvilServer) -> None:
    async def run() -> None:
        fetcher = MediaFetcher(AllowedHosts([f"127.0.0.1:{evil.port}"]))
        for path in ("/hang", "/drip", "/endless"):
            before = evil.connections
            task = asyncio.create_task(
                fetcher.fetch(
                    evil.url(path), NAME, max_bytes=1 << 40, on_bytes=lambda _: None, timeout=60
                )
            )
            while evil.connections == before:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: evil.open_connections == 0)
        fetcher.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_fetches_at_once_are_limited(evil: EvilServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_MAX_CONCURRENT", 2)

    async def run() -> list[Any]:
        fetcher = MediaFetcher(AllowedHosts([f"127.0.0.1:{evil.port}"]))
        before, tasks = evil.connections, []
        for timeout in (2.0, 2.0, 0.2, 0.2, 0.2):  # the last three never get a slot
            hanging = fetcher.fetch(
                evil.url("/hang"), NAME, max_bytes=9, on_bytes=lambda _: None, timeout=timeout
            )
            tasks.append(asyncio.create_task(hanging))
        results = await asyncio.gather(*tasks[2:], return_exceptions=True)
        assert evil.connections - before == 2
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fetcher.close()
        return results

    assert [getattr(r, "status", None) for r in asyncio.run(run())] == [408] * 3


# TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a certificate of media.test; its key is in the same file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    path = tmp_path_factory.mktemp("tls") / "media.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-nodes", "-days", "2", "-subj", "/CN=media.test", "-addext"]
        + ["subjectAltName=DNS:media.test", "-keyout", str(path), "-out", f"{path}.crt"],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_tls_verifies_the_name_of_the_url_at_the_checked_address(certificate: Path) -> None:
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate)
    names: list[str] = []
    server_context.sni_callback = lambda _, name, __: names.append(name)
    resolver = StubResolver(media_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
    trusted = ssl.create_default_context(cafile=str(certificate))
    with EvilServer({"/a.png": b"picture"}, server_context) as evil:
        entries = [f"media.test:{evil.port}={LOOPBACK}", f"other.test:{evil.port}={LOOPBACK}"]
        url = evil.url("/a.png", "media.test", "https")
        assert fetch(url, entries, resolver, context=trusted) == b"picture"
        assert names == ["media.test"]
        # A certificate of another name, and one that nothing vouches for.
        other = evil.url("/a.png", "other.test", "https")
        assert refusal(other, entries, resolver, context=trusted).status == 502
        assert refusal(url, entries, resolver).status == 502
        assert len(evil.hits) == 1


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)
