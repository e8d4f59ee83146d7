"""Exception hierarchy, with the exit code and HTTP status of each class.

    Qwen2VLError
      ConfigError      invalid config field, recipe or override                exit 2
      InputError       invalid messages, media or parameters                   exit 2, HTTP 400
      CapacityError    request can never fit (context, cache, pixels)          exit 2, HTTP 400
      CheckpointError  unusable weight folder, or one of another model         exit 2
      EngineError      the engine died, is in use, or was closed               exit 1, HTTP 503

A message states what, where, the value received, the limit, and the remedy. Errors that a user, a
file or the network can cause are raised; bugs of this library are asserted. `abbreviate` and
`suggest` are parts of such messages. Standard library only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "InputError",
    "Qwen2VLError",
    "abbreviate",
    "copy_error",
    "suggest",
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

    exit_code = 2


class EngineError(Qwen2VLError, RuntimeError):
    """The engine died, is in use, or was closed; if it died, `__cause__` is the first cause."""


def copy_error(error: Qwen2VLError, prefix: str = "") -> Qwen2VLError:
    """Return a new exception of the same class, cause and text, after a prefix.

    Several callers need one each: an object that is raised twice collects both tracebacks.
    """
    copied = type(error)(f"{prefix}{error}")
    copied.__cause__ = error.__cause__
    return copied


def abbreviate(value: object, limit: int = 60) -> str:
    """Return the repr of a value for a message, in one line of at most `limit` characters."""
    is_cut = False
    if isinstance(value, (str, bytes, bytearray)):  # may be a file of hundreds of megabytes
        value, is_cut = value[:limit], len(value) > limit
    try:
        # Without addresses of objects: they say nothing, and weaken address randomization.
        text = re.sub(" at 0x[0-9A-Fa-f]+", "", " ".join(repr(value).split()))
    except Exception:  # nested too deeply, too many digits, or any bug of the value's class
        text = f"<{type(value).__name__}>"
    return f"{text[: limit - 3]}..." if is_cut or len(text) > limit else text


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the closest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
