"""Fetch of one remote medium: resolve once, check every address, connect to exactly that one.

Each of at most 3 redirects is checked anew. The connection goes to the checked address, while Host
and the TLS server name are those of the URL: a second DNS answer has no effect (DNS rebinding). No
proxies, cookies or content encodings; one deadline; a canceled fetch closes its socket.

    400  not allowed, a malformed response, more bytes than the limit
    408  connection or body too slow
    422  another 4xx status of the remote server (as vLLM), or too many redirects
    502  no DNS answer, no connection, remote 5xx, 408 or 429: the same request may succeed later
(vLLM: HTTPConnection, MediaConnector.load_from_url_async.)
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpcore2
import httpx2

from qwen2vl.server.errors import SERVER_ERROR, APIError
from qwen2vl.server.media.addresses import (
    AllowedHosts,
    IPAddress,
    is_public,
    parse_media_url,
    port_of,
    unmap,
)

__all__ = ["MediaFetcher", "Resolver"]

logger = logging.getLogger(__name__)

Resolver = Callable[..., Sequence[Any]]  # the signature of socket.getaddrinfo

_MAX_REDIRECTS = 3
_MAX_ADDRESSES = 8  # of one host; more are not tried
_MAX_CONCURRENT = 32  # fetches of all requests
_CONNECT_TIMEOUT = 5.0  # seconds for one address; less if the deadline is earlier
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE = frozenset({408, 425, 429})
_HEADERS = (
    (b"User-Agent", b"qwen2vl"),
    (b"Accept", b"image/*, video/*, */*;q=0.5"),
    (b"Accept-Encoding", b"identity"),
    (b"Connection", b"close"),
)


class MediaFetcher:
    """Fetches media from allowed hosts; used by one event loop.

    Args:
        hosts: from which media may come.
        resolver: socket.getaddrinfo, or a stand-in for it.
        ssl_context: of https connections; None: the system's or certifi's certificates, which
            SSL_CERT_FILE and SSL_CERT_DIR replace.
    """

    def __init__(
        self,
        hosts: AllowedHosts,
        *,
        resolver: Resolver = socket.getaddrinfo,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = hosts
        self._resolver = resolver
        self._ssl_context = ssl_context
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT)
        # Its own threads: a DNS server that hangs must not occupy those of the processor.
        self._dns_threads = ThreadPoolExecutor(8, thread_name_prefix="qwen2vl-dns")

    async def fetch(
        self,
        url: str,
        name: str,
        *,
        max_bytes: int,
        on_bytes: Callable[[int], None],
        timeout: float,
    ) -> bytes:
        """Return the body of a URL.

        Args:
            url: http or https.
            name: of the item, for errors: "messages[0].content[1]".
            max_bytes: limit of the body.
            on_bytes: called with the count of each chunk; raises to stop.
            timeout: seconds for everything, waiting for a free slot included.

        Raises:
            APIError: see the module.
        """
        try:
            async with asyncio.timeout(timeout), self._slots:
                return await self._follow(url, name, max_bytes, on_bytes)
        except TimeoutError as error:
            raise APIError(
                408,
                f"{name}: the URL did not arrive in {timeout:.0f} s; try again, or send the bytes "
                "as a data URL",
                param=name,
                code="media_timeout",
            ) from error

    def close(self) -> None:
        """Release the threads of the DNS resolver; running fetches must have ended."""
        self._dns_threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(
        self, text: str, name: str, max_bytes: int, on_bytes: Callable[[int], None]
    ) -> bytes:
        for _ in range(_MAX_REDIRECTS + 1):
            url = parse_media_url(text, name)
            addresses = await self._resolve(url, name)
            async with self._open(url, addresses, name) as response:
                if response.status not in _REDIRECTS:
                    return await _read(response, name, max_bytes, on_bytes)
                text = _location(url, response, name)
        raise _failure(422, name, f"the URL redirects more than {_MAX_REDIRECTS} times")

    async def _resolve(self, url: httpx2.URL, name: str) -> list[IPAddress]:
        """Return the addresses of a host, all of which have been checked."""
        networks = self._hosts.check_host(url, name)
        host = url.raw_host.decode("ascii")
        lookup = partial(self._resolver, host, port_of(url), type=socket.SOCK_STREAM)
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(self._dns_threads, lookup)
            found = [unmap(ipaddress.ip_address(answer[4][0])) for answer in answers]
        except (OSError, UnicodeError, ValueError) as error:
            logger.info("%s: no DNS answer for %s: %s", name, host, type(error).__name__)
            text = "the host of the URL has no address; try again, or check the URL"
            raise _failure(502, name, text) from error
        for address in found:
            if not is_public(address) and not any(address in network for network in networks):
                logger.warning("%s: %s has the address %s: refused", name, host, address)
                text = (
                    "the host of the URL has an address that is not public; an operator can allow "
                    "it with --allowed-media-domains HOST:PORT=NETWORK"
                )
                raise _failure(400, name, text, "media_not_allowed")
        if not found:
            raise _failure(502, name, "the host of the URL has no address; try again")
        return list(dict.fromkeys(found))[:_MAX_ADDRESSES]

    @asynccontextmanager
    async def _open(
        self, url: httpx2.URL, addresses: list[IPAddress], name: str
    ) -> AsyncIterator[httpcore2.Response]:
        """Send GET, and yield the response with its headers; the socket is closed at the end."""
        backend = _PinnedBackend(addresses)
        target = httpcore2.URL(
            scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
        )
        headers = [(b"Host", url.netloc), *_HEADERS]
        try:
            context = await self._get_ssl_context() if url.scheme == "https" else None
            async with (
                httpcore2.AsyncConnectionPool(
                    ssl_context=context, max_connections=1, network_backend=backend
                ) as pool,
                pool.stream(
                    "GET",
                    target,
                    headers=headers,
                    extensions={"timeout": {"connect": _CONNECT_TIMEOUT}},
                ) as response,
            ):
                yield response
        except httpcore2.ProtocolError as error:
            _log(name, url, error)
            text = "the remote server's response is malformed or ends too early"
            raise _failure(400, name, text) from error
        except httpcore2.TimeoutException as error:
            _log(name, url, error)
            text = f"the remote server did not accept a connection in {_CONNECT_TIMEOUT:.0f} s"
            raise _failure(408, name, f"{text}; try again", "media_timeout") from error
        except (httpcore2.NetworkError, OSError) as error:
            _log(name, url, error)
            text = "the connection to the remote server failed; try again"
            raise _failure(502, name, text) from error

    async def _get_ssl_context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = await asyncio.to_thread(httpx2.create_ssl_context)
        return self._ssl_context


class _PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that have been checked, whatever host it is asked for."""

    def __init__(self, addresses: list[IPAddress]) -> None:
        self._addresses = addresses
        self._backend: Any = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore2.AsyncNetworkStream:
        *others, last = self._addresses
        for address in others:
            try:
                return await self._backend.connect_tcp(str(address), port, timeout)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._backend.connect_tcp(str(last), port, timeout)


async def _read(
    response: httpcore2.Response, name: str, max_bytes: int, on_bytes: Callable[[int], None]
) -> bytes:
    _check_status(response.status, name)
    headers = {key.lower(): value for key, value in response.headers}
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        text = "the remote server compressed its response, although it was asked not to"
        raise _failure(400, name, text)
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(name, max_bytes)
    content = bytearray()
    async for chunk in response.aiter_stream():
        content += chunk
        if len(content) > max_bytes:
            raise _too_large(name, max_bytes)
        on_bytes(len(chunk))
    return bytes(content)


def _check_status(status: int, name: str) -> None:
    if status == 200:
        return
    if status >= 500 or status in _RETRYABLE:
        text = f"the remote server answered {status}; try again later"
        raise _failure(502, name, text)
    raise _failure(422, name, f"the remote server answered {status}; check the URL")


def _location(url: httpx2.URL, response: httpcore2.Response, name: str) -> str:
    """Return the absolute target of a redirect; it is checked like the first URL."""
    locations = [value for key, value in response.headers if key.lower() == b"location"]
    try:
        (location,) = locations
        text = location.decode("ascii")
        if not text or "\\" in text:  # a backslash is a slash to some parsers
            raise ValueError("empty, or with a backslash")
        return str(url.join(text))
    except (ValueError, httpx2.InvalidURL) as error:
        raise _failure(422, name, "the URL redirects to an invalid URL; check it") from error


def _too_large(name: str, max_bytes: int) -> APIError:
    text = f"the URL has more than {max_bytes:,} bytes, which is the limit; give a smaller file"
    return _failure(400, name, text, "media_too_large")


def _failure(status: int, name: str, text: str, code: str = "media_fetch_failed") -> APIError:
    kind = SERVER_ERROR if status >= 500 else "invalid_request_error"
    retry_after = 1.0 if status >= 500 else None
    return APIError(
        status, f"{name}: {text}", type=kind, param=name, code=code, retry_after=retry_after
    )


def _log(name: str, url: httpx2.URL, error: Exception) -> None:
    """Log the class of an error and the host; paths and queries of URLs may hold secrets."""
    host = url.raw_host.decode("ascii")
    logger.info("%s: fetch from %s failed: %s", name, host, type(error).__name__)
