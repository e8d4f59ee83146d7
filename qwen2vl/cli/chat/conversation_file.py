"""Files of conversations: JSON lists of messages, which /save writes and /load reads.

Images and videos are saved by their absolute paths, those from stdin as data URLs.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2vl.cli import terminal
from qwen2vl.cli.chat.backend import ChatMessage
from qwen2vl.cli.media_arguments import is_url, split_file_names
from qwen2vl.errors import InputError
from qwen2vl.files import atomic_file

__all__ = ["conversation_path", "read_conversation", "save_conversation"]


def conversation_path(command: str, name: str) -> Path:
    """Return the path that was typed after a command.

    Raises:
        InputError: there is none.
    """
    if not name:
        raise InputError(f"{command} needs a file: {command} FILE.json")
    return Path(os.path.expanduser(split_file_names(name)[0]))


def save_conversation(path: Path, messages: Sequence[ChatMessage], *, name: str) -> None:
    """Write messages to a file; only a file that is a conversation is overwritten.

    Raises:
        InputError: the file is something else, or cannot be written; `name` is what was typed.
    """
    if path.exists():
        read_conversation(path, "it is not overwritten; choose another name")
    text = json.dumps(_portable(messages), indent=1, ensure_ascii=False)
    terminal.check_parent_folder(str(path), flag="/save")
    try:
        with atomic_file(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"/save {name}: cannot be written: {error.strerror}") from error


def read_conversation(path: Path, remedy: str) -> list[ChatMessage]:
    """Read a JSON list of messages, or an object with the key `messages`.

    Raises:
        InputError: the file cannot be read, or is something else; the message ends in `remedy`.
    """
    from qwen2vl.processor.messages import parse_messages

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}; {remedy}") from error
    messages: Any = content.get("messages") if isinstance(content, dict) else content
    try:
        parse_messages(messages)
    except InputError as error:
        raise InputError(f"{path}: is no conversation: {error}; {remedy}") from error
    return messages


def _portable(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return messages as JSON values: files by absolute path, bytes from stdin as data URLs."""

    def portable(value: Any) -> Any:
        if isinstance(value, bytes):
            return f"data:;base64,{base64.b64encode(value).decode()}"
        is_path = isinstance(value, str) and not is_url(value)
        return os.path.abspath(os.path.expanduser(value)) if is_path else value

    def portable_part(part: ChatMessage) -> ChatMessage:
        kinds = [kind for kind in ("image", "video") if kind in part]
        return {**part, **{kind: portable(part[kind]) for kind in kinds}}

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [portable_part(part) for part in message["content"]]}
        for message in messages
    ]
