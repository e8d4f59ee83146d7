"""ChatBackend: the interface between a chat session and what generates the answers.

A backend describes images and videos as they are attached, and begins a turn: it validates the
messages, then the turn streams the answer into a DeltaWriter. Errors of a message are InputError
or CapacityError, failures of a server are ChatServerError; the session reports them and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen2vl.cli.boxes import SizedItem
from qwen2vl.cli.terminal import DeltaWriter
from qwen2vl.errors import EngineError

__all__ = ["ChatBackend", "ChatMessage", "ChatServerError", "ChatTurn", "MediaSummary"]

ChatMessage = dict[str, Any]


class ChatServerError(EngineError):
    """The server of a chat cannot be reached, failed, or broke its answer off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSummary:
    """What is known of images and videos before they are sent."""

    lines: tuple[str, ...]  # one for each
    total: str  # of all: "1,234 tokens", or "3.4 MB"


class ChatTurn(Protocol):
    """One answer that is about to be generated."""

    @property
    def shown(self) -> Sequence[SizedItem]:
        """The images and videos that boxes of the answer refer to."""
        ...

    def run(self, writer: DeltaWriter) -> None:
        """Stream the answer into the writer.

        Raises:
            InputError, CapacityError: the request was refused.
            ChatServerError: the server failed.
            KeyboardInterrupt: Ctrl-C; generation has stopped.
        """
        ...

    def save_annotated(self, text: str, output: str) -> None:
        """Draw the boxes of the answer on the images and videos shown, into `output`."""
        ...


class ChatBackend(Protocol):
    """Generates the answers of a chat session."""

    adapter: str | None  # which LoRA adapter, or model of a server, answers

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that /adapter takes."""
        ...

    @property
    def no_adapters(self) -> str:
        """What to do where /adapter has no names to choose from."""
        ...

    def describe(self, messages: Sequence[ChatMessage]) -> MediaSummary:
        """Validate messages, and describe their images and videos.

        Raises:
            InputError, CapacityError: a message, image or video cannot be used.
        """
        ...

    def begin(self, messages: Sequence[ChatMessage], *, retry: int = 0) -> ChatTurn:
        """Validate a conversation and return the turn that answers it.

        Args:
            messages: in the format of `LLM.chat`; the last one is the user's.
            retry: added to the random seed, if there is one: the same seed gives the same answer.

        Raises:
            InputError, CapacityError: the conversation cannot be answered.
        """
        ...

    def forget(self) -> None:
        """Forget which images and videos were described: another conversation begins."""
        ...
