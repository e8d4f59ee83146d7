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
from typing import Any, cast

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "EngineDeadError",
    "EngineError",
    "InputError",
    "MediaTooLargeError",
    "MediaWorkerError",
    "MediaWorkersBusyError",
    "Qwen2VLError",
    "UnknownKeyError",
    "abbreviate",
    "copy_error",
    "suggest",
]

MAX_NAME = 200  # characters of a name for which a similar one is looked for


class Qwen2VLError(Exception):
    """Base class of all errors that this library raises deliberately."""

    exit_code = 1  # exit status of the command line

    def __init__(self, *args: object, param: str | None = None) -> None:
        """Take the text; `param` is the path of what is wrong: "messages[2].content[1]"."""
        super().__init__(*args)
        self.param = param


class ConfigError(Qwen2VLError, ValueError):
    """A field of a config, a recipe or an override is invalid."""

    exit_code = 2


class InputError(Qwen2VLError, ValueError):
    """Messages, media or parameters are invalid."""

    exit_code = 2
    code = "invalid_value"  # reason for programs, sent by the server (OpenAI: error.code)


class MediaTooLargeError(InputError):
    """An image or video is over a limit: bytes, pixels, frames, seconds or memory."""

    code = "media_too_large"


class UnknownKeyError(InputError):
    """A message or content item has a key that does not exist."""

    code = "unknown_parameter"


class CapacityError(Qwen2VLError, ValueError):
    """The request can never fit: context, cache, memory or pixels."""

    exit_code = 2


class CheckpointError(Qwen2VLError):
    """A weight folder is missing, corrupt, unsafe, or belongs to another model."""

    exit_code = 2


class EngineError(Qwen2VLError, RuntimeError):
    """The engine died, is in use, or was closed; if it died, `__cause__` is the first cause."""


class EngineDeadError(EngineError):
    """The engine died or was closed, and all its requests with it. (vLLM: EngineDeadError.)"""


class MediaWorkerError(EngineError):
    """A process that decodes images and videos has stopped, or cannot be started."""


class MediaWorkersBusyError(MediaWorkerError):
    """All processes that decode images and videos are busy for longer than a request may wait."""


def copy_error(error: Qwen2VLError, prefix: str = "") -> Qwen2VLError:
    """Return a new exception of the same class, cause, param and text, after a prefix.

    Several callers need one each: an object that is raised twice collects both tracebacks.
    """
    copied = type(error)(f"{prefix}{error}")
    copied.__cause__ = error.__cause__
    copied.param = error.param
    return copied


def abbreviate(value: object, limit: int = 60) -> str:
    """Return the repr of a value for a message, in one line of at most `limit` characters."""
    is_cut = False
    if isinstance(value, (str, bytes, bytearray)):  # may be a file of hundreds of megabytes
        value, is_cut = value[:limit], len(value) > limit
    elif isinstance(value, (list, dict)):  # or a list of a million numbers
        value = _head(value, [limit])
    try:
        # Without addresses of objects: they say nothing, and weaken address randomization.
        text = re.sub(" at 0x[0-9A-Fa-f]+", "", " ".join(repr(value).split()))
    except Exception:  # nested too deeply, too many digits, or any bug of the value's class
        text = f"<{type(value).__name__}>"
    return f"{text[: limit - 3]}..." if is_cut or len(text) > limit else text


def _head(value: Any, budget: list[int]) -> Any:
    """Return a JSON value without what its repr has after `budget[0]` characters."""
    budget[0] -= 1 + len(value) if isinstance(value, str) else 1
    if isinstance(value, list):
        items = cast("list[Any]", value)
        return [_head(one, budget) for one in items if budget[0] > -1]
    if isinstance(value, dict):
        fields = cast("dict[Any, Any]", value)
        return {
            key[:MAX_NAME] if isinstance(key, str) else key: _head(one, budget)
            for key, one in fields.items()
            if budget[0] > -1
        }
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the closest known one, or all of them."""
    names = sorted(known)
    # Comparing takes time in proportion to the length of a name that a client has chosen.
    close = difflib.get_close_matches(name, names, 1) if len(name) <= MAX_NAME else []
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
