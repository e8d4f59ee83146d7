"""Health of the server: /health, /ping, /ready, and the restart of an engine that died.

/health is 200 while the engine thread lives and its current step is not longer than
`engine_timeout`; /ping is the same (SageMaker's route); /ready also needs that the server is not
draining. All need no key and tell nothing else. `restart_dead_engine` runs as long as the
application does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from starlette.responses import Response

from qwen2vl.errors import Qwen2VLError

if TYPE_CHECKING:
    from starlette.requests import Request

    from qwen2vl.server.state import ServerState

__all__ = ["health", "is_healthy", "ready", "restart_dead_engine"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
MAX_PAUSE_SECONDS = 30.0  # between restarts of an engine that dies again at once


def is_healthy(state: ServerState) -> bool:
    """Return whether the engine runs, and no step of it takes longer than the limit."""
    return state.engine.is_alive and state.engine.seconds_in_step < state.config.engine_timeout


async def health(request: Request) -> Response:
    """Answer 200 while the engine works, else 503; the body is empty."""
    return Response(status_code=200 if is_healthy(request.app.state.server) else 503)


async def ready(request: Request) -> Response:
    """Answer 200 while new requests are taken, else 503; the body is empty."""
    state: ServerState = request.app.state.server
    is_ready = is_healthy(state) and not state.is_draining
    return Response(status_code=200 if is_ready else 503)


async def restart_dead_engine(
    state: ServerState, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Restart the engine whenever it has died, until canceled; its requests have got an error.

    An engine that dies again at once is restarted less and less often; `sleep` is for tests.
    """
    pause = POLL_SECONDS
    while True:
        await sleep(pause)
        if state.engine.is_alive or state.is_draining:
            pause = POLL_SECONDS
            continue
        try:
            await asyncio.to_thread(state.engine.restart)
        except Qwen2VLError:
            logger.exception("the engine died and could not be restarted; trying again")
        else:
            state.metrics.count_restart()
            logger.warning("the engine died and was restarted")
        pause = min(MAX_PAUSE_SECONDS, 2 * pause)
