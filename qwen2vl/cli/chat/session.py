"""ChatSession: the messages of one chat, its commands, and the loop that reads lines.

Lines that begin with / are commands (/help lists them); every other line is a user message. Ctrl-C
stops the generation and keeps the partial answer in the conversation; a second Ctrl-C, without
input in between, exits with code 130. An invalid turn or command is reported and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qwen2vl.cli import boxes, terminal
from qwen2vl.cli.chat.backend import ChatBackend, ChatMessage, ChatServerError
from qwen2vl.cli.chat.conversation_file import (
    conversation_path,
    read_conversation,
    save_conversation,
)
from qwen2vl.cli.media_arguments import MediaFile, expand_media, split_file_names
from qwen2vl.errors import CapacityError, InputError

if TYPE_CHECKING:
    from qwen2vl.processor.content import Modality

__all__ = ["ChatSession", "read_message"]

QUOTES = '"""'
LEAVING = ("/quit", "/exit", "quit", "exit")
MAX_LISTED_ITEMS = 4  # of one command; more are summed up in one line

HELP = """\
/image FILE...  attach images to the next message; patterns such as *.png are expanded
/video FILE...  attach videos to the next message
/system TEXT    set the system prompt; without TEXT, the model's default
/retry          answer the last message again
/undo           detach what is attached; else take back the last message and its answer
/save FILE      save the conversation as JSON
/load FILE      load a saved conversation in place of this one
/adapter NAME   answer with another adapter of those given by --adapter, or with another
                model of the server; without NAME, list them
/clear          clear the conversation
/help           show this list
/quit           exit (as Ctrl-D, exit and quit do)
A line that ends with \\ continues on the next; \"\"\" begins and ends a text of several lines.
Ctrl-C stops the generation."""


class ChatSession:
    """One conversation, and the images and videos attached to its next message."""

    def __init__(
        self,
        backend: ChatBackend,
        *,
        video_options: Mapping[str, Any] | None = None,
        output: str | None = None,
    ) -> None:
        """Begin an empty conversation.

        Args:
            backend: what answers.
            video_options: keys of the content parts of the videos that are attached, as fps.
            output: image file or folder for answers with boxes, drawn.
        """
        self.backend = backend
        self.video_options = dict(video_options or {})
        self.output = output
        self.messages: list[ChatMessage] = []  # a system prompt, if any, is the first
        self.pending_media: list[ChatMessage] = []
        self.num_retries = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": lambda names: self._attach_named("image", names),
            "/video": lambda names: self._attach_named("video", names),
            "/system": self.set_system,
            "/retry": self._retry,
            "/undo": self._undo,
            "/save": self._save,
            "/load": self._load,
            "/adapter": self._use_adapter,
            "/clear": self._clear,
            "/help": lambda _: terminal.echo(HELP),
        }

    def run(self) -> None:
        """Read and handle messages until the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C twice, with nothing typed between.
        """
        interrupted = False
        while True:
            is_prompting = True
            try:
                text = read_message()
                if text is None or text.strip() in LEAVING:
                    return
                interrupted = False
                is_prompting = False
                self.handle_line(text.strip())
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                terminal.echo("")
                stopped = "" if is_prompting else "stopped; "
                terminal.note(f"{stopped}Ctrl-C again, Ctrl-D or /quit leaves")

    def handle_line(self, line: str) -> None:
        """Run a command or send a message; an error is reported and changes nothing."""
        command, *arguments = line.split(maxsplit=1) or [""]
        try:
            if command in self.commands:
                self.commands[command](arguments[0].strip() if arguments else "")
            elif line.startswith("/") and "/" not in command[1:]:
                terminal.note(f"{command} is no command; /help lists them")
            elif line:
                content = [*self.pending_media, {"type": "text", "text": line}]
                self._answer(self.messages, {"role": "user", "content": content})
        except (InputError, CapacityError, ChatServerError) as error:
            terminal.note(f"error: {error}")

    def attach(self, files: list[MediaFile]) -> None:
        """Validate images and videos; attach them to the next message.

        Raises:
            InputError, CapacityError: one cannot be read; nothing has changed.
        """
        if not files:
            return
        parts = [file.to_part(self.video_options) for file in files]
        summary = self.backend.describe([{"role": "user", "content": parts}])
        self.pending_media += parts
        if len(summary.lines) > MAX_LISTED_ITEMS:
            terminal.note(f"{len(files)} files -> {summary.total}; now ask about them")
            return
        for line in summary.lines:
            terminal.note(f"{line}; now ask about it")

    def set_system(self, text: str) -> None:
        """Replace the system prompt; an empty one restores the model's default."""
        turns = self.messages[_has_system(self.messages) :]
        self.messages = ([{"role": "system", "content": text}] if text else []) + turns
        terminal.note("the system prompt is " + ("set" if text else "the model's default"))

    def _attach_named(self, kind: Modality, names: str) -> None:
        if not names:
            raise InputError(f"/{kind} needs a file: /{kind} FILE")
        self.attach(
            [
                file
                for name in split_file_names(names)
                for file in expand_media(kind, name, flag=f"/{kind}")
            ]
        )

    def _answer(self, before: list[ChatMessage], message: ChatMessage, *, retry: int = 0) -> None:
        """Answer a user message; both join the conversation once the answer has begun."""
        messages = [*before, message]
        turn = self.backend.begin(messages, retry=retry)
        writer = terminal.DeltaWriter(boxes.GroundingText(turn.shown))
        try:
            turn.run(writer)
        finally:
            if writer.text:
                self.messages = [*messages, {"role": "assistant", "content": writer.text}]
                self.pending_media = []
        if self.output and boxes.parse_shapes(writer.text, turn.shown):
            turn.save_annotated(writer.text, self.output)

    def _retry(self, _: str) -> None:
        index = self._last_user_message()
        self.num_retries += 1
        pending = self.pending_media
        try:
            self._answer(self.messages[:index], self.messages[index], retry=self.num_retries)
        finally:
            self.pending_media = pending

    def _undo(self, _: str) -> None:
        if self.pending_media:
            self.pending_media = []
            terminal.note("the attached files are detached; /undo again takes back a message")
            return
        index = self._last_user_message()
        content = self.messages[index]["content"]
        media = [] if isinstance(content, str) else [part for part in content if not _text(part)]
        self.messages = self.messages[:index]
        self.pending_media = media
        again = "; what it showed is attached to the next" if media else ""
        terminal.note(f"the last message is taken back{again}")

    def _last_user_message(self) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index]["role"] == "user":
                return index
        raise InputError("there is no message yet; ask something first")

    def _save(self, name: str) -> None:
        path = conversation_path("/save", name)
        if not self.messages:
            raise InputError("there is nothing to save yet; ask something first")
        save_conversation(path, self.messages, name=name)
        pending = "; the attached images or videos are not part of it" if self.pending_media else ""
        terminal.note(f"saved {len(self.messages)} messages to {path}{pending}")

    def _load(self, name: str) -> None:
        path = conversation_path("/load", name)
        messages = read_conversation(path, "/save writes such a file")
        try:
            summary = self.backend.describe(messages)
        except (InputError, CapacityError) as error:
            raise InputError(f"{path}: {error}; the conversation is unchanged") from error
        self.messages, self.pending_media = messages, []
        self.backend.forget()
        terminal.note(f"loaded {len(messages)} messages from {path}")
        for line in summary.lines:
            terminal.note(line)

    def _use_adapter(self, name: str) -> None:
        backend = self.backend
        names = backend.adapters
        if not names:
            raise InputError(backend.no_adapters)
        if not name:
            others = [known for known in names if known != backend.adapter]
            more = f"; /adapter NAME chooses another of {', '.join(others)}" if others else ""
            terminal.note(f"{backend.adapter} answers{more}")
            return
        if name not in names:
            raise InputError(f"/adapter {name}: no such adapter; known: {', '.join(names)}")
        backend.adapter = name
        terminal.note(f"{name} answers from here on")

    def _clear(self, _: str) -> None:
        self.messages = self.messages[: _has_system(self.messages)]
        self.pending_media = []
        self.backend.forget()
        kept = "; the system prompt is kept" if self.messages else ""
        terminal.note(f"the conversation is cleared{kept}")


def read_message() -> str | None:
    """Read a line, or several that are continued, quoted or pasted; None at the end of input."""
    lines: list[str] = []
    is_quoted = False
    while True:
        line = terminal.read_line("... " if lines else "> ")
        if line is None:
            break
        line = line.rstrip("\r\n")
        is_quoted ^= line.count(QUOTES) % 2 == 1
        is_continued = line.endswith("\\") and not is_quoted
        lines.append(line[:-1] if is_continued else line)
        if not (is_quoted or is_continued or terminal.has_pasted_line()):
            break
    return "\n".join(lines).replace(QUOTES, "") if lines else None


def _has_system(messages: list[ChatMessage]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def _text(part: ChatMessage) -> bool:
    return "text" in part
