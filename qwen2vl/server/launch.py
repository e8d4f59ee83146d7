"""Start of a server: the objects it needs, in an order that makes it ready soon.

    bind the port -> start the media workers -> load the model -> application -> listen

The port is bound before anything is loaded, so that a port in use is reported at once; clients are
refused ("connection refused", as with vLLM) until everything is loaded. The workers import their
decoders in processes of their own while this one imports torch.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl.server.config import ServerConfig
from qwen2vl.server.listener.sockets import open_socket

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, AsyncLLM
    from qwen2vl.processor.media.decoder import MediaDecoder
    from qwen2vl.processor.media_worker.pool import MediaWorkerPool
    from qwen2vl.server.listener.http_server import HTTPServer
    from qwen2vl.server.state import ServerState

__all__ = ["build_server", "build_state", "forced_exit_status", "prepare_llm", "run_server"]

logger = logging.getLogger(__name__)

_IMPORTS_WITHOUT_TORCH = (
    *("numpy", "PIL.Image", "tokenizers", "pydantic.json_schema", "uvloop"),
    *("prometheus_client", "starlette.applications"),
    "qwen2vl.server.metrics",
    "qwen2vl.server.listener.http_server",
)
MAX_CONTAINER_FRAMES = 500_000  # of a video file; how many of them are decoded is another limit
ABORT_EXIT_SECONDS = 3.5
# Computing in bfloat16, torch and oneDNN each keep 1,024 matrix products by the shapes that they
# have seen: with nano 300 MB, reached after thousands of requests. Those of decode steps, which
# come again, are some 100.
ONEDNN_CACHES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


def prepare_llm(llm: LLM, config: ServerConfig, decoder: MediaDecoder) -> None:
    """Make the processor of an LLM that of a server: it reads no files and no URLs by itself.

    Args:
        llm: not yet in use.
        config: limits of media.
        decoder: a MediaWorkerPool, or LOCAL_DECODER to decode in this process.
    """
    from qwen2vl.processor.image_formats.formats import SERVER_IMAGE_FORMATS
    from qwen2vl.processor.media.source import MediaLimits

    limits = MediaLimits(
        max_bytes=max(config.max_image_bytes, config.max_video_bytes),
        max_image_pixels=config.max_image_pixels,
        max_frames=MAX_CONTAINER_FRAMES,
        max_seconds=config.max_video_seconds,
        decode_timeout=config.media_decode_timeout,
        allow_urls=False,
        allow_files=False,
        image_formats=SERVER_IMAGE_FORMATS,
    )
    llm.processor = llm.processor.with_media(decoder, limits)


def build_state(engine: AsyncLLM, config: ServerConfig) -> ServerState:
    """Build what the handlers share, for an engine that runs.

    Raises:
        ConfigError: an allowed host or folder of media is malformed.
    """
    from qwen2vl.server.admission import Admission
    from qwen2vl.server.media.connector import MediaConnector
    from qwen2vl.server.metrics import ServerMetrics
    from qwen2vl.server.state import ServerState

    metrics = ServerMetrics(config.served_model_names[0], engine.stats)
    return ServerState(
        engine=engine,
        config=config,
        metrics=metrics,
        admission=Admission(
            max_running=engine.llm.engine_config.max_num_seqs,
            max_queue=config.max_queue,
            max_per_key=config.max_requests_per_key,
            on_reject=metrics.reject,
        ),
        connector=MediaConnector(config),
    )


def build_server(
    state: ServerState,
    *,
    metrics_socket: socket.socket | None = None,
    on_started: Callable[[], None] = lambda: None,
    on_abort: Callable[[], None] = lambda: None,
) -> HTTPServer:
    """Build the server of a state; `server.run([socket])` runs it until a signal.

    Args:
        state: of the server.
        metrics_socket: bound socket of the listener for /metrics; None: it is on the main one.
        on_started: called once connections are accepted.
        on_abort: called when running requests are aborted at the end.
    """
    from qwen2vl.server.app import create_app, create_metrics_app
    from qwen2vl.server.listener.http_server import HTTPServer

    companion = None
    if metrics_socket is not None:
        companion = HTTPServer(create_metrics_app(state), state), metrics_socket
    return HTTPServer(
        create_app(state), state, companion=companion, on_started=on_started, on_abort=on_abort
    )


def run_server(
    config: ServerConfig,
    load: Callable[[], LLM],
    *,
    on_ready: Callable[[ServerState, int], None] = lambda state, port: None,
) -> int:
    """Load a model and serve it until SIGTERM or Ctrl-C; return the exit status, which is 0.

    A second signal ends the process at once, with the status of `forced_exit_status`.

    Args:
        config: of the server.
        load: loads the model; called after the port was bound and the media workers were started.
        on_ready: called with state and port once connections are accepted.

    Raises:
        ConfigError: the address or the port cannot be used.
        EngineError: the media workers do not start.
        Qwen2VLError: as `load` does.
    """
    for name, capacity in ONEDNN_CACHES.items():  # read at their first use
        os.environ.setdefault(name, capacity)
    gc.disable()  # imports create very many objects that stay: collecting among them takes time
    with ExitStack() as stack:
        sock = stack.enter_context(open_socket(config.host, config.port))
        metrics_socket = None
        if config.metrics_port is not None:
            metrics_socket = stack.enter_context(open_socket("127.0.0.1", config.metrics_port))
        _load_libtorch()
        decoder = _start_decoder(config, stack)
        _import_without_torch()
        llm = stack.enter_context(load())
        prepare_llm(llm, config, decoder)
        from qwen2vl.engine import AsyncLLM

        engine = AsyncLLM(llm)
        stack.callback(engine.close)
        state = build_state(engine, config)
        port = sock.getsockname()[1]
        server = build_server(
            state,
            metrics_socket=metrics_socket,
            on_started=lambda: on_ready(state, port),
            on_abort=lambda: _limit_exit(server),
        )
        decoder.wait_until_ready()  # they have had the time of `import torch`
        gc.enable()
        gc.freeze()  # later collections do not visit what was imported and loaded
        server.run([sock])
        if server.force_exit:
            _exit_now(forced_exit_status(server.forcing_signal))
    return 0


def forced_exit_status(signal_number: int | None) -> int:
    """Return the exit status after a second signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (signal.SIGTERM if signal_number is None else signal_number)


def _load_libtorch() -> None:
    """Begin to load torch's library in a thread, without the interpreter's lock: it takes long."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    path = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"

    def load() -> None:
        with suppress(OSError):  # `import torch` reports it, if it matters
            ctypes.CDLL(str(path))

    threading.Thread(target=load, name="load-libtorch", daemon=True).start()


def _import_without_torch() -> None:
    """Import what the server needs besides torch, while torch's library is loaded."""
    for name in _IMPORTS_WITHOUT_TORCH:
        importlib.import_module(name)


def _start_decoder(config: ServerConfig, stack: ExitStack) -> MediaWorkerPool:
    from qwen2vl.processor.media_worker.pool import MediaWorkerPool
    from qwen2vl.processor.media_worker.worker_process import WorkerLimits

    limits = WorkerLimits(image_seconds=config.media_decode_timeout)
    pool = MediaWorkerPool(config.num_media_workers, limits)
    pool.start()
    stack.callback(pool.close)
    return pool


def _limit_exit(server: HTTPServer) -> None:
    """End the process in some seconds, even if a thread is in a long step."""

    def end() -> None:
        _exit_now(forced_exit_status(server.forcing_signal) if server.force_exit else 0)

    timer = threading.Timer(ABORT_EXIT_SECONDS, end)
    timer.daemon = True
    timer.start()


def _exit_now(status: int) -> None:
    """End the process without waiting for threads, which may be in a long step."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
