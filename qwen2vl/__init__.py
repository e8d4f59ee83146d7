"""The complete Qwen2-VL system in Python and PyTorch: inference, preprocessing and training.

    from qwen2vl import LLM
    print(LLM().chat("What is the total?", images="receipt.png")[0].text)

Public names are imported lazily, when they are first used (PEP 562): `import qwen2vl` does not
import torch. docs/architecture.md describes the packages.
"""

from __future__ import annotations

from importlib import import_module
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

__version__ = "0.2.0"

_LAZY_IMPORTS = {
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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'qwen2vl' has no attribute {name!r}")
    value = getattr(import_module(_LAZY_IMPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
