"""`qwen2vl chat`: interactive multi-turn conversation about images and videos.

Lines that begin with / are commands (/help lists them); every other line is a user message. Ctrl-C
stops the generation and keeps the partial answer in the conversation; a second Ctrl-C, without
input in between, exits with code 130. An invalid turn or command is reported and changes nothing.
A saved conversation is a JSON list of messages, as `LLM.chat` takes them.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import annotate, boxes, options, terminal
from qwen2vl.cli.media_arguments import (
    MediaFile,
    expand_media,
    is_url,
    latest_media,
    read_media_arguments,
    split_file_names,
)
from qwen2vl.cli.prompt_summary import format_item, note_nano_limits, print_prompt_summary
from qwen2vl.errors import CapacityError, InputError
from qwen2vl.files import atomic_file

if TYPE_CHECKING:
    from qwen2vl.cli.options import LoadedModel
    from qwen2vl.engine import SamplingParams
    from qwen2vl.processor.content import Modality
    from qwen2vl.processor.inputs import Item

__all__ = ["ChatSession", "chat"]

ChatMessage = dict[str, Any]

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
/adapter NAME   answer with another adapter of those given by --adapter; without NAME, list them
/clear          clear the conversation
/help           show this list
/quit           exit (as Ctrl-D, exit and quit do)
A line that ends with \\ continues on the next; \"\"\" begins and ends a text of several lines.
Ctrl-C stops the generation."""


@click.command()
@click.argument("names", metavar="[FILE]...", nargs=-1)
@options.media_input_options
@options.system_option
@options.model_options
@options.sampling_options
@options.media_preprocessing_options
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    help="Draw an answer's boxes on a copy of its image, or on the frames of its video; as for "
    "`ask`.",
)
@terminal.debug_option
def chat(names: tuple[str, ...], system: str | None, output: str | None, **given: Any) -> None:
    """Chat about images and videos in several turns; /help lists the commands of the chat.

    FILE is an image or a video, recognized by its content; the first message shows them.

    \b
    qwen2vl chat receipt.png
    """
    if output:
        annotate.check_output(output, 1)  # images may come later
    params = options.sampling_params_from_options(given)
    files = read_media_arguments(names)
    loaded = options.load_model_from_options(given)
    terminal.note(
        f"{loaded.name} is ready; /image FILE attaches an image, /help lists the commands"
    )
    session = ChatSession(loaded, params, given["fps"], output)
    if system:
        session.set_system(system)
    session.attach(files)
    session.run()


class ChatSession:
    """One conversation, and the images and videos attached to its next message."""

    def __init__(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        fps: float | None,
        output: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.llm = loaded.llm
        self.params = replace(params, adapter=next(iter(loaded.adapter_names), None))
        self.fps = fps
        self.output = output
        self.messages: list[ChatMessage] = []  # a system prompt, if any, is the first
        self.pending_media: list[ChatMessage] = []
        self.num_noted_items = 0  # items whose notes were already written
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
        self._has_noted_limits = False

    def run(self) -> None:
        """Read and handle messages until the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C twice, with nothing typed between.
        """
        interrupted = False
        while True:
            is_prompting = True
            try:
                text = _read_message()
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
                self._answer(self.messages, {"role": "user", "content": content}, self.params)
        except (InputError, CapacityError) as error:
            terminal.note(f"error: {error}")

    def attach(self, files: list[MediaFile]) -> None:
        """Preprocess images and videos to validate them; attach them to the next message.

        Raises:
            InputError, CapacityError: one cannot be read; nothing has changed.
        """
        if not files:
            return
        parts = [file.to_part(self.fps) for file in files]
        prompt = self.llm.processor([{"role": "user", "content": parts}])
        self.pending_media += parts
        if len(prompt.items) > MAX_LISTED_ITEMS:
            count = sum(item.num_tokens for item in prompt.items)
            terminal.note(f"{len(files)} files -> {count:,} tokens; now ask about them")
            return
        for item in prompt.items:
            terminal.note(f"{format_item(item)}; now ask about it")

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

    def _answer(
        self, before: list[ChatMessage], message: ChatMessage, params: SamplingParams
    ) -> None:
        """Answer a user message; both join the conversation once the answer has begun."""
        messages = [*before, message]
        prepared = self.llm.prepare(messages, params)
        items = prepared.prompt.items
        print_prompt_summary(self.llm, prepared.prompt, num_noted_items=self.num_noted_items)
        self.num_noted_items = len(items)
        files, first = latest_media(messages)
        shown: tuple[Item, ...] = items[first : first + len(files)]
        writer = terminal.DeltaWriter(boxes.GroundingText(shown))
        try:
            with writer.interrupts_between_steps():
                (completion,) = self.llm.generate_prepared(
                    [prepared], on_delta=writer, on_step=writer.raise_if_interrupted
                )
        finally:
            if writer.text:
                self.messages = [*messages, {"role": "assistant", "content": writer.text}]
                self.pending_media = []
        if self.output and boxes.parse_shapes(completion.text, shown):
            annotate.save_annotated(completion.text, files, shown, self.output, self.llm.processor)
        options.note_truncation(self.llm, params, completion)
        if not self._has_noted_limits:
            self._has_noted_limits = note_nano_limits(self.loaded, prepared.prompt)

    def _retry(self, _: str) -> None:
        index = self._last_user_message()
        params = self.params
        self.num_retries += 1
        if params.seed is not None:  # the same seed would give the same answer
            params = replace(params, seed=(params.seed + self.num_retries) % 2**64)
        pending = self.pending_media
        try:
            self._answer(self.messages[:index], self.messages[index], params)
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
        path = _conversation_path("/save", name)
        if not self.messages:
            raise InputError("there is nothing to save yet; ask something first")
        if path.exists():
            _read_conversation(path, "it is not overwritten; choose another name")
        text = json.dumps(_portable(self.messages), indent=1, ensure_ascii=False)
        terminal.check_parent_folder(str(path), flag="/save")
        try:
            with atomic_file(path) as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"/save {name}: cannot be written: {error.strerror}") from error
        pending = "; the attached images or videos are not part of it" if self.pending_media else ""
        terminal.note(f"saved {len(self.messages)} messages to {path}{pending}")

    def _load(self, name: str) -> None:
        path = _conversation_path("/load", name)
        messages = _read_conversation(path, "/save writes such a file")
        try:
            prompt = self.llm.processor(messages)
        except (InputError, CapacityError) as error:
            raise InputError(f"{path}: {error}; the conversation is unchanged") from error
        self.messages, self.pending_media, self.num_noted_items = messages, [], 0
        terminal.note(f"loaded {len(messages)} messages from {path}")
        for item in prompt.items:
            terminal.note(format_item(item))

    def _use_adapter(self, name: str) -> None:
        names = self.loaded.adapter_names
        if not names:
            raise InputError("there are no adapters to choose from; start with --adapter NAME=DIR")
        if not name:
            others = [known for known in names if known != self.params.adapter]
            more = f"; /adapter NAME chooses another of {', '.join(others)}" if others else ""
            terminal.note(f"{self.params.adapter} answers{more}")
            return
        if name not in names:
            raise InputError(f"/adapter {name}: no such adapter; known: {', '.join(names)}")
        self.params = replace(self.params, adapter=name)
        terminal.note(f"{name} answers from here on")

    def _clear(self, _: str) -> None:
        self.messages = self.messages[: _has_system(self.messages)]
        self.pending_media, self.num_noted_items = [], 0
        kept = "; the system prompt is kept" if self.messages else ""
        terminal.note(f"the conversation is cleared{kept}")


def _read_message() -> str | None:
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


def _conversation_path(command: str, name: str) -> Path:
    if not name:
        raise InputError(f"{command} needs a file: {command} FILE.json")
    return Path(os.path.expanduser(split_file_names(name)[0]))


def _read_conversation(path: Path, remedy: str) -> list[ChatMessage]:
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


def _portable(messages: list[ChatMessage]) -> list[ChatMessage]:
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
