"""The ways this library refuses, as one tree.

    Qwen2VLError
      ConfigError      a config field, a recipe or an override is wrong        exit 2
      InputError       messages, media or parameters cannot be used            exit 2, HTTP 400
      CapacityError    the request can never fit (context, cache, pixels)      exit 2, HTTP 400
      CheckpointError  a weight folder cannot be used, or fits another model   exit 1
      EngineError      the engine died; carries the first cause                exit 1, HTTP 503

A text says what, where, what was got, the limit, and what to do. `raise` is for what a user,
a file or the network can cause; our own bugs are `assert`ed. Standard library only.
"""

from __future__ import annotations

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "InputError",
    "Qwen2VLError",
]


class Qwen2VLError(Exception):
    """Root of everything this library raises on purpose."""

    exit_code = 1  # what the command line ends with


class ConfigError(Qwen2VLError, ValueError):
    """A field of a config, a recipe or an override is wrong."""

    exit_code = 2


class InputError(Qwen2VLError, ValueError):
    """Messages, media or parameters cannot be used as they are."""

    exit_code = 2


class CapacityError(Qwen2VLError, ValueError):
    """The request can never fit: context, cache, memory or pixels."""

    exit_code = 2


class CheckpointError(Qwen2VLError):
    """A weight folder is missing, damaged, unsafe, or of another model."""


class EngineError(Qwen2VLError, RuntimeError):
    """The engine died; `__cause__` is the first cause."""
