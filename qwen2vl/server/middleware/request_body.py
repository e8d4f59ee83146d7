"""Request bodies: content type, size while streaming, total time, and bytes of all requests.

The size is refused from Content-Length before anything is read, or as soon as the bytes received
exceed it. The deadline is that of the whole body, and earlier for one that comes slower than
MIN_BYTES_PER_SECOND. (Apache: RequestReadTimeout body=10,MinRate=1000.)
routing.py reads the body of a known route after access control, so that strangers cannot fill
memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.types import Receive

from qwen2vl.errors import abbreviate
from qwen2vl.server.errors import APIError
from qwen2vl.server.sse import ClientDisconnectedError

__all__ = ["BodyReader"]

MIB = 1024**2
JSON_TYPE = "application/json"
# A body up to this size is read however much others hold: clients that are slow to send theirs
# keep no text out.
FREE_BYTES = 65_536
FIRST_SECONDS = 10.0  # that a body has in any case; more as its bytes come
MIN_BYTES_PER_SECOND = 1000


class BodyReader:
    """Reads request bodies within the limits of one server."""

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout: float,
        max_total_bytes: int,
        free_bytes: int = FREE_BYTES,
        on_reject: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Set the limits.

        Args:
            max_bytes: of one body.
            timeout: seconds from the call of `read` to the last byte.
            max_total_bytes: of all bodies that are held; `release` returns them.
            free_bytes: of a body that is read however much the others hold.
            on_reject: called with "body_memory" when a body is refused for others' bytes.
        """
        self.max_bytes = max_bytes
        self.timeout = timeout
        self.max_total_bytes = max_total_bytes
        self.free_bytes = free_bytes
        self.held_bytes = 0
        self._on_reject = on_reject

    async def read(self, request: Request) -> bytes:
        """Return the body of a JSON route; its bytes count as held until `release`.

        Raises:
            APIError: 415 wrong content type or encoding; 413 too large; 408 too slow; 429 other
                requests hold too many bytes.
            ClientDisconnectedError: the client is gone.
        """
        _check_content_type(request)
        self._check_length(request.headers.get("content-length"))
        body = bytearray()
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._seconds_for(0)) as timer:
                async for _ in self._receive_into(body, request.receive):
                    timer.reschedule(began + self._seconds_for(len(body)))
        except TimeoutError:
            self.release(len(body))
            raise APIError(
                408,
                f"the request body was not complete after {self._seconds_for(len(body)):.3g} s, "
                f"{len(body):,} bytes had arrived; send it faster",
                code="request_timeout",
            ) from None
        except BaseException:
            self.release(len(body))
            raise
        return bytes(body)

    def release(self, num_bytes: int) -> None:
        """Stop counting the bytes of a body whose request has ended."""
        self.held_bytes -= num_bytes

    def _seconds_for(self, num_bytes: int) -> float:
        """Return the seconds in which a body must be complete of which so much has arrived."""
        return min(self.timeout, FIRST_SECONDS + num_bytes / MIN_BYTES_PER_SECOND)

    async def _receive_into(self, body: bytearray, receive: Receive) -> AsyncIterator[None]:
        """Append what arrives, until the body is complete; yields after each chunk."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnectedError
            chunk = message.get("body", b"")
            body += chunk
            self.held_bytes += len(chunk)
            if len(body) > self.max_bytes:
                raise self._too_large(f"more than {self.max_bytes:,}")
            if self.held_bytes > self.max_total_bytes and len(body) > self.free_bytes:
                self._on_reject("body_memory")
                raise APIError(
                    429,
                    "the bodies of the requests that run or wait fill the memory set aside for "
                    f"them, {self.max_total_bytes / MIB:g} MiB; retry later",
                    type="rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=1.0,
                )
            if not message.get("more_body", False):
                return
            yield

    def _check_length(self, length: str | None) -> None:
        # h11 has checked that it is a number of at most twenty digits.
        if length is not None and length.isdecimal() and int(length) > self.max_bytes:
            raise self._too_large(f"{int(length):,}")

    def _too_large(self, got: str) -> APIError:
        return APIError(
            413,
            f"the request body has {got} bytes, the limit is {self.max_bytes:,}; send smaller or "
            "fewer images and videos (--max-body-bytes raises the limit)",
            code="body_too_large",
        )


def _check_content_type(request: Request) -> None:
    """Accept JSON only: a page of another site cannot send it without asking (CORS preflight)."""
    given = request.headers.get("content-type")
    if given is None or given.partition(";")[0].strip().lower() != JSON_TYPE:
        got = "none" if given is None else abbreviate(given)
        raise APIError(
            415,
            f"Content-Type: got {got}, must be {JSON_TYPE}",
            code="unsupported_media_type",
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise APIError(
            415,
            f"Content-Encoding: got {abbreviate(encoding)}, must be absent; send the body as it is",
            code="unsupported_media_type",
        )
