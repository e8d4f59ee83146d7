"""The listening server: uvicorn's, with a drain before it closes.

After the first SIGTERM or Ctrl-C, /ready answers 503 and new requests are refused with 503, while
running ones finish until `shutdown_timeout`; then the engine is closed, and they end with an error.
A second signal ends everything at once, and `forcing_signal` tells which one it was. Requests that
had arrived before the first signal are accepted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.types import ASGIApp

from qwen2vl.server.listener.http_protocol import bounded_protocol
from qwen2vl.server.state import ServerState

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HTTPServer"]

logger = logging.getLogger(__name__)

BACKLOG = 2048
ACCEPT_SECONDS = 0.1  # requests that the kernel held when the signal came are read meanwhile
POLL_SECONDS = 0.02
ABORT_SECONDS = 2.0  # for the error events of requests that were aborted
LIFESPAN_SECONDS = 0.5  # for the end of the application's lifespan after a second signal


class HTTPServer(uvicorn.Server):
    """uvicorn's server, which drains when it stops."""

    def __init__(
        self,
        app: ASGIApp,
        state: ServerState,
        *,
        companion: tuple[HTTPServer, socket.socket] | None = None,
        on_started: Callable[[], None] = lambda: None,
        on_abort: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            state: of the server.
            companion: a second server and its socket, which runs as long as this one; it does not
                drain.
            on_started: called once connections are accepted.
            on_abort: called when running requests are aborted, for a time limit of the exit.
        """
        self._on_abort = on_abort
        self._state = state
        self._companion = companion
        self._companion_task: asyncio.Task[None] | None = None
        self._on_started = on_started
        self.forcing_signal: int | None = None  # the second signal, which ends at once
        limits = state.config
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded_protocol(limits),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=max(1, round(limits.keep_alive_timeout)),
                timeout_graceful_shutdown=1,
                h11_max_incomplete_event_size=limits.max_header_bytes,
                backlog=BACKLOG,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and report it."""
        await super().startup(sockets)
        if self._companion is not None:
            server, sock = self._companion
            # The signals of this process are those of the main server.
            server.capture_signals = nullcontext  # type: ignore[method-assign] - of one object
            self._companion_task = asyncio.create_task(server.serve([sock]))
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end at once at the second."""
        if self.should_exit:
            self.force_exit = True
            self.forcing_signal = sig
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close the listener and what is left of the connections."""
        await self._drain()
        await super().shutdown(sockets)
        if self.force_exit:
            # uvicorn skips this then; the lifespan's task would be canceled and log a traceback.
            with suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), LIFESPAN_SECONDS)
        if self._companion is not None and self._companion_task is not None:
            self._companion[0].should_exit = True
            await self._companion_task

    async def _drain(self) -> None:
        state = self._state
        await self._wait_for(lambda: False, ACCEPT_SECONDS)
        state.admission.is_draining = True
        num_running = state.admission.num_requests
        if num_running:
            logger.warning(
                "draining: %s running, with %g s to finish",
                _count_requests(num_running),
                state.config.shutdown_timeout,
            )
        if await self._wait_for(self._is_idle, state.config.shutdown_timeout):
            return
        logger.warning("aborting %s", _count_requests(state.admission.num_requests))
        self._on_abort()
        # In a thread, because it waits for the step that runs; not awaited, because that may hang.
        threading.Thread(target=state.engine.close, name="close-engine", daemon=True).start()
        await self._wait_for(self._is_idle, ABORT_SECONDS, is_interruptible=False)

    def _is_idle(self) -> bool:
        return self._state.admission.is_idle

    async def _wait_for(
        self, condition: Callable[[], bool], seconds: float, *, is_interruptible: bool = True
    ) -> bool:
        """Return whether a condition held within some seconds; a second signal ends the wait."""
        deadline = time.monotonic() + seconds
        while not condition():
            is_forced = is_interruptible and self.force_exit
            if is_forced or time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but do not raise them again: draining exits with 0."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()


def _count_requests(count: int) -> str:
    return f"{count} request" if count == 1 else f"{count} requests"
