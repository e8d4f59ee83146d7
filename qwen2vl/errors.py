"""Exception hierarchy, with the exit code and HTTP status of each class.

    Qwen2VLError
      ConfigError      invalid config field, recipe or override                exit 2
      InputError       invalid messages, media or parameters                   exit 2, HTTP 400
      CapacityError    request can never fit (context, cache, pixels)          exit 2, HTTP 400
      CheckpointError  unusable weight folder, or one of another model         exit 1
      EngineError      the engine died; carries the first cause                exit 1, HTTP 503

A message states what, where, the value received, the limit, and the remedy. Errors that a user, a
file or the network can cause are raised; bugs of this library are asserted. Standard library only.
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
    """Base class of all errors that this library raises deliberately."""

    exit_code = 1  # exit status of the command line


class ConfigError(Qwen2VLError, ValueError):
    """A field of a config, a recipe or an override is invalid."""

    exit_code = 2


class InputError(Qwen2VLError, ValueError):
    """Messages, media or parameters are invalid."""

    exit_code = 2


class CapacityError(Qwen2VLError, ValueError):
    """The request can never fit: context, cache, memory or pixels."""

    exit_code = 2


class CheckpointError(Qwen2VLError):
    """A weight folder is missing, corrupt, unsafe, or belongs to another model."""


class EngineError(Qwen2VLError, RuntimeError):
    """The engine died; `__cause__` is the first cause."""
