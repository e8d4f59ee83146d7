"""Access control: Host, Origin and API key, before anything of a request's body is read.

Host: only loopback names, the address the server is bound to and allowed hosts, so that a web page
cannot reach a local server through a name of its own (DNS rebinding). Origin: browsers send it for
requests of web pages; a foreign one is refused unless allowed, and allowed ones get CORS headers.
Key: compared in constant time on every path but the public ones, unknown paths included.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import blake2b, sha256
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl.errors import abbreviate
from qwen2vl.server.errors import APIError
from qwen2vl.server.middleware.responses import error_response
from qwen2vl.server.state import Caller

__all__ = ["PUBLIC_PATHS", "AccessControlMiddleware", "ApiKeys", "is_loopback"]

PUBLIC_PATHS = frozenset({"/health", "/ping", "/ready"})
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
UNSPECIFIED = frozenset({"0.0.0.0", "::", ""})
MAX_KEY_BYTES = 4096
UNSAFE_FRAMING = "invalid_http"
MAX_HEADERS = 100

CORS_METHODS = b"GET, POST, OPTIONS"
CORS_HEADERS = b"authorization, content-type, x-request-id, x-api-key"  # if none are asked for
HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CORS_MAX_AGE = b"600"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is one of the loopback interface."""
    return host in LOOPBACK_NAMES or (host.startswith("127.") and host.replace(".", "").isdigit())


class ApiKeys:
    """The API keys of a server, as digests; compares in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]
        # Of this process only: a salt says nothing about the key, and differs after a restart.
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: bytes) -> int | None:
        """Return the index of a key, or None; all keys are compared whatever the result."""
        digest = sha256(key).digest()
        found: int | None = None
        for index, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = index
        return found

    def cache_salt(self, index: int) -> bytes:
        """Return what keeps the cache entries of a key apart; empty if there is only one key."""
        if len(self._digests) < 2:
            return b""
        return blake2b(self._digests[index], key=self._secret, digest_size=16).digest()


class AccessControlMiddleware:
    """Refuses requests of a foreign Host or Origin, and those without a valid API key."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        bound_host: str,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        public_paths: Iterable[str] = PUBLIC_PATHS,
        max_header_bytes: int = 16_384,
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            keys: API keys; none: no key is needed.
            bound_host: name or address that the server listens at.
            allowed_hosts: further values of the Host header, without port; "*": any.
            allowed_origins: values of the Origin header, as "https://example.com"; "*": any.
            public_paths: paths that need no key.
            max_header_bytes: of path, query string and all headers.
        """
        self.app = app
        self._keys = keys
        self._hosts = {host.lower().strip("[]") for host in allowed_hosts}
        if bound_host not in UNSPECIFIED:
            self._hosts.add(bound_host.lower())
        self._binds_all = bound_host in UNSPECIFIED
        self._origins = {origin.lower().rstrip("/") for origin in allowed_origins}
        self._public_paths = frozenset(public_paths)
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = _single_headers(scope)
        try:
            self._check_size(scope)
            _check_framing(headers)
            self._check_host(headers, scope)
            origin = self._check_origin(headers)
        except APIError as error:
            response = error_response(error)
            if error.code == UNSAFE_FRAMING:  # what follows may belong to another client of a proxy
                response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if origin is not None:
            send = _with_cors(send, origin, _allowed_headers(headers))
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await Response(status_code=204)(scope, receive, send)
                return
        try:
            self._check_key(headers, scope)
        except APIError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        """Check the headers; the protocol checks only those that arrive in several pieces."""
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes or len(scope["headers"]) > MAX_HEADERS:
            raise APIError(
                431,
                f"{len(scope['headers'])} headers and a path of {size:,} bytes in total, the "
                f"limits are {MAX_HEADERS} and {self._max_header_bytes:,}; send less",
                code="headers_too_large",
            )

    def _check_host(self, headers: dict[bytes, bytes], scope: Scope) -> None:
        host = host_name(headers.get(b"host", b""))
        if host is None:
            raise APIError(400, "Host: the header is missing or malformed", code="invalid_host")
        if is_loopback(host) or host in self._hosts or "*" in self._hosts:
            return
        if self._binds_all and scope.get("server") and host == scope["server"][0]:
            return  # the address of this machine that the client connected to
        raise APIError(
            403,
            f"Host: {abbreviate(host)} is not a name of this server; start it with "
            "--allowed-hosts to add it",
            type="permission_error",
            code="host_not_allowed",
        )

    def _check_origin(self, headers: dict[bytes, bytes]) -> bytes | None:
        """Return the origin to grant by CORS headers; None if the request has none or our own."""
        given = headers.get(b"origin")
        if given is None:
            return None
        origin = given.decode("latin-1").lower().rstrip("/")
        if origin in self._origins or "*" in self._origins:
            return given
        if _authority(origin) == headers.get(b"host", b"").decode("latin-1").lower():
            return None  # a page of this server
        raise APIError(
            403,
            f"Origin: {abbreviate(origin)} may not use this server; start it with "
            "--allowed-origins to allow it",
            type="permission_error",
            code="origin_not_allowed",
        )

    def _check_key(self, headers: dict[bytes, bytes], scope: Scope) -> None:
        if not self._keys or scope["path"] in self._public_paths:
            return
        key = _api_key(headers)
        index = None if key is None else self._keys.find(key[:MAX_KEY_BYTES])
        if index is None:
            how = "give one as" if key is None else "the one given is not valid; give another as"
            raise APIError(
                401,
                f"this server needs an API key: {how} Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
            )
        caller: Caller = scope["state"]["caller"]
        scope["state"]["caller"] = Caller(caller.request_id, self._keys.cache_salt(index))


def _check_framing(headers: dict[bytes, bytes]) -> None:
    """Refuse a body with two lengths, of which a proxy may take the other (request smuggling)."""
    if b"transfer-encoding" in headers and b"content-length" in headers:
        raise APIError(
            400,
            "the request has both Content-Length and Transfer-Encoding; send one of them",
            code=UNSAFE_FRAMING,
        )


def host_name(header: bytes) -> str | None:
    """Return the name or address in a Host header, without port and brackets; None: malformed."""
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port.startswith(":") and port[1:].isdecimal())):
            return None
        return host
    host, colon, port = text.partition(":")
    is_valid = host and not set(host) & set("/\\@?#%, ") and (not colon or port.isdecimal())
    return host.rstrip(".") if is_valid else None


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _api_key(headers: dict[bytes, bytes]) -> bytes | None:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key")


def _single_headers(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers; one that is sent twice has an empty value, which nothing accepts."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers[name] = b"" if name in headers else value
    return headers


def _allowed_headers(headers: dict[bytes, bytes]) -> bytes:
    """Return the header names that a preflight asks for; CORS_HEADERS if it asks for none.

    Clients have headers of their own, as OpenAI's in a browser has x-stainless-*. The origin is
    what is checked: a page of an allowed one may send any header.
    """
    names = [
        name.strip() for name in headers.get(b"access-control-request-headers", b"").split(b",")
    ]
    return b", ".join(names) if all(map(HEADER_NAME.fullmatch, names)) else CORS_HEADERS


def _with_cors(send: Send, origin: bytes, allowed_headers: bytes) -> Send:
    extra = [
        (b"access-control-allow-origin", origin),
        (b"access-control-allow-methods", CORS_METHODS),
        (b"access-control-allow-headers", allowed_headers),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
        (b"access-control-max-age", CORS_MAX_AGE),
        (b"vary", b"origin, access-control-request-headers"),
    ]

    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return send_with_cors
