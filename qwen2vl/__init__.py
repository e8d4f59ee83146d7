"""The complete Qwen2-VL system in Python and PyTorch.

    from qwen2vl import LLM
    content = [{"image": "receipt.png"}, {"text": "What is the total?"}]
    print(LLM().chat([{"role": "user", "content": content}])[0].text)

`import qwen2vl` costs nothing: each name below is imported when it is first used. Read the rooms
upward from geometry.py; docs/architecture.md is the map.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2vl.config import Qwen2VLConfig
    from qwen2vl.engine import LLM, AsyncLLM, Completion, EngineConfig, Grammar, SamplingParams
    from qwen2vl.loading import load
    from qwen2vl.model import Qwen2VL
    from qwen2vl.processor.processor import Processor

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "EngineConfig",
    "Grammar",
    "Processor",
    "Qwen2VL",
    "Qwen2VLConfig",
    "SamplingParams",
    "load",
]

__version__ = "0.1.0"

_ROOMS = {
    "LLM": "qwen2vl.engine",
    "AsyncLLM": "qwen2vl.engine",
    "EngineConfig": "qwen2vl.engine",
    "Grammar": "qwen2vl.engine",
    "Completion": "qwen2vl.engine",
    "Processor": "qwen2vl.processor.processor",
    "Qwen2VL": "qwen2vl.model",
    "Qwen2VLConfig": "qwen2vl.config",
    "SamplingParams": "qwen2vl.engine",
    "load": "qwen2vl.loading",
}


class _Door(ModuleType):
    """Keep `load` the function: importing the room load.py would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _ROOMS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Door


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'qwen2vl' has no attribute {name!r}")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
