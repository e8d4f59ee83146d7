"""ServerBackend: a chat session answered by an OpenAI-compatible server.

No model is loaded and torch is not imported. Grounding tokens are asked for by
`skip_special_tokens: false` (vLLM, SGLang, `qwen2vl serve`), so that boxes are shown in pixels. A
field that a server does not know is left out from then on. `qwen2vl serve` also tells how it saw
each image (`usage.media`), which is noted once.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from qwen2vl.cli import annotate, terminal
from qwen2vl.cli.chat.backend import ChatMessage, ChatServerError, MediaSummary
from qwen2vl.cli.chat.server_connection import ServerConnection
from qwen2vl.cli.chat.server_messages import (
    describe_media,
    latest_shown_media,
    to_openai_messages,
)
from qwen2vl.cli.terminal import DeltaWriter
from qwen2vl.errors import InputError, suggest

__all__ = ["ServerBackend", "ServerTurn"]

# Field of a request that some servers refuse -> the field in its place; None: nothing.
OPTIONAL_FIELDS = {
    "skip_special_tokens": None,
    "stream_options": None,
    "repetition_penalty": None,
    "logprobs": None,
    "max_tokens": "max_completion_tokens",
}


@dataclass(frozen=True, slots=True)
class _TextDelta:
    """A piece of a streamed answer."""

    text: str
    finish_reason: str | None = None


class ServerBackend:
    """Answers with a model of an OpenAI-compatible server. (Implements ChatBackend.)"""

    no_adapters = "the server lists no models; choose one with --model NAME"

    def __init__(
        self, connection: ServerConnection, model: str | None, parameters: dict[str, Any]
    ) -> None:
        """Ask the server for its models, and choose one.

        Args:
            connection: to the server.
            model: its name on the server; None: the first that the server lists.
            parameters: fields of the requests: max_tokens, temperature, ...; None is left out.

        Raises:
            InputError: the server has no such model, or names none.
            ChatServerError: the server cannot be reached.
        """
        self.connection = connection
        self._models = tuple(connection.list_models())
        if model is not None and self._models and model not in self._models:
            raise InputError(
                f"--model {model}: {connection.url} has no such model; "
                f"{suggest(model, self._models)}"
            )
        if model is None and not self._models:
            raise InputError(f"{connection.url}: {self.no_adapters}")
        self.adapter: str | None = model or self._models[0]
        self._parameters = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "skip_special_tokens": False,
            **{name: value for name, value in parameters.items() if value is not None},
        }
        self._num_noted_items = 0  # items whose sizes and notes were already written

    @property
    def adapters(self) -> tuple[str, ...]:
        """The models of the server: the base model and its LoRA adapters."""
        return self._models

    def describe(self, messages: Sequence[ChatMessage]) -> MediaSummary:
        """Return the sizes of images and videos, by their headers; nothing is sent.

        Raises:
            InputError: a message is invalid, or a file cannot be read.
        """
        return describe_media(messages)

    def begin(self, messages: Sequence[ChatMessage], *, retry: int = 0) -> ServerTurn:
        """Return the turn of a conversation; it is sent when the turn runs.

        Raises:
            InputError: a message is invalid, or a file cannot be read.
        """
        body = self.request_body(messages)
        if "seed" in body:  # the same seed would give the same answer
            body["seed"] = (body["seed"] + retry) % 2**63
        return ServerTurn(self, body, messages)

    def request_body(self, messages: Sequence[ChatMessage]) -> dict[str, Any]:
        """Return the request of a conversation, as `stream` takes it.

        Raises:
            InputError: a message is invalid, or a file cannot be read.
        """
        return {
            "model": self.adapter,
            "messages": to_openai_messages(messages),
            **self._parameters,
        }

    def forget(self) -> None:
        """Note the sizes of all items again: another conversation begins."""
        self._num_noted_items = 0

    def stream(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """Yield the chunks of an answer; fields that the server does not know are left out.

        Raises:
            InputError, ChatServerError: as `ServerConnection.stream_chat` does.
        """
        while True:
            chunks = self.connection.stream_chat(body)
            with closing(chunks):
                try:
                    first = next(chunks, None)
                except InputError as error:
                    refused = [name for name in OPTIONAL_FIELDS if name in body]
                    refused = [name for name in refused if name in str(error)]
                    if not refused:
                        raise
                    body = _without(body, refused)
                    continue
                self._keep_fields(body)
                if first is not None:
                    yield first
                    yield from chunks
                return

    def note_media(self, usage: dict[str, Any]) -> None:
        """Write how the server saw each image and video that is new; our server alone tells."""
        entries = usage.get("media")
        if not isinstance(entries, list):
            return
        for entry in entries[self._num_noted_items :]:
            if isinstance(entry, dict) and (line := _format_media(entry)):
                terminal.note(line)
        self._num_noted_items = len(entries)

    def _keep_fields(self, body: dict[str, Any]) -> None:
        """Send later requests with the fields that this one was accepted with."""
        for name, replacement in OPTIONAL_FIELDS.items():
            if name in self._parameters and name not in body:
                value = self._parameters.pop(name)
                if replacement:
                    self._parameters[replacement] = value


class ServerTurn:
    """One answer of a server. (Implements ChatTurn.)"""

    def __init__(
        self, backend: ServerBackend, body: dict[str, Any], messages: Sequence[ChatMessage]
    ) -> None:
        self._backend = backend
        self._body = body
        self._files, self.shown = latest_shown_media(messages)

    def run(self, writer: DeltaWriter) -> None:
        """Send the request and stream its answer; Ctrl-C closes the connection, which aborts it.

        Raises:
            InputError: the server refused the request.
            ChatServerError: the server failed, or its stream broke off.
        """
        usage: dict[str, Any] = {}
        finish_reason: str | None = None
        try:
            with closing(self._backend.stream(self._body)) as chunks:
                for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    delta = _read_delta(chunk)
                    if finish_reason is None and (delta.text or delta.finish_reason):
                        finish_reason = delta.finish_reason
                        writer(delta)
            if finish_reason is None:
                raise ChatServerError("the server ended its stream before the answer was complete")
        except ChatServerError:
            if writer.text and finish_reason is None:
                terminal.echo("")
            raise
        self._backend.note_media(usage)
        if finish_reason == "length":
            terminal.note(f"the answer was cut{_limit_reached(self._body, usage)}")

    def save_annotated(self, text: str, output: str) -> None:
        """Draw the boxes of the answer on the latest images."""
        annotate.save_annotated(text, self._files, self.shown, output)


def _read_delta(chunk: dict[str, Any]) -> _TextDelta:
    """Return the text of the first sample in a chunk."""
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("refusal") or ""
            return _TextDelta(str(text), choice.get("finish_reason"))
    return _TextDelta("")


def _without(body: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a request without some fields, or with others in their place."""
    kept = {name: value for name, value in body.items() if name not in names}
    for name in names:
        if replacement := OPTIONAL_FIELDS[name]:
            kept[replacement] = body[name]
    return kept


def _limit_reached(body: dict[str, Any], usage: dict[str, Any]) -> str:
    """Return why an answer was cut, as far as the usage tells."""
    count = usage.get("completion_tokens")
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    if not isinstance(count, int):
        return "; --max-tokens allows more"
    cut = f" after {count:,} token{'s' * (count != 1)}"
    if limit is None or count >= limit:
        return f"{cut}; --max-tokens allows more"
    return f"{cut}, where the context is full; show or ask less at once"


def _format_media(entry: dict[str, Any]) -> str:
    """Format an entry of `usage.media`: `image 1240 x 1754 -> 980 x 1386, 1,715 tokens`."""
    try:
        sizes = [
            terminal.format_size((entry[name]["height"], entry[name]["width"]))
            for name in ("original_size", "resized_size")
        ]
        frames = f", {entry['frames']} frames" if entry.get("frames") else ""
        notes = "".join(f"; {note}" for note in entry.get("notes") or ())
        line = f"{entry['type']} {' -> '.join(sizes)}{frames}, {entry['tokens']:,} tokens{notes}"
    except (KeyError, TypeError, ValueError):
        return ""  # another server's idea of the field
    return terminal.escape_control_characters(line)
