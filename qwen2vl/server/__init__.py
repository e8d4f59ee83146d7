"""The HTTP server: OpenAI's API with vLLM's extensions, for one model on one device.

    create_app(state)     ASGI application with middleware and routes (app.py)
    ServerConfig          limits, names, keys and allow-lists (config.py)
    run_server(...)       loads, listens, serves, drains (launch.py)

Public names are imported lazily (PEP 562): `import qwen2vl.server` imports neither torch nor
starlette, so that the command line checks its options before anything is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2vl.server.app import create_app
    from qwen2vl.server.config import ServerConfig
    from qwen2vl.server.launch import run_server

__all__ = ["ServerConfig", "create_app", "run_server"]

_LAZY_IMPORTS = {
    "ServerConfig": "qwen2vl.server.config",
    "create_app": "qwen2vl.server.app",
    "run_server": "qwen2vl.server.launch",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'qwen2vl.server' has no attribute {name!r}")
    value = getattr(import_module(_LAZY_IMPORTS[name]), name)
    globals()[name] = value
    return value
