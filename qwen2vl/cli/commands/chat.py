"""`qwen2vl chat`: talk about pictures and clips, turn by turn.

Lines that begin with / are commands (/help lists them); everything else is said to the model.
Ctrl-C stops the answer and keeps what was said of it; a second one, with nothing typed between,
leaves with 130. A turn that cannot be used is named and dropped, the conversation stays.
Next room: tokens.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.prompt_summary import item_line, say_outlook
from qwen2vl.errors import CapacityError, InputError

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, SamplingParams

__all__ = ["Chat", "chat"]

HELP = """\
/image PATH   show a picture with the next question
/video PATH   show a clip with the next question
/clear        forget the conversation
/help         this list
/quit         leave (as Ctrl-D does)
Ctrl-C stops an answer."""


@click.command()
@options.shown_options
@options.model_options
@options.sampling_options
@options.media_options
@click.option("-o", "output", metavar="PNG", help="Draw an answer's boxes on its picture.")
@terminal.debug_option
def chat(images: tuple[str, ...], videos: tuple[str, ...], **given: Any) -> None:
    """Talk about pictures and clips; /help inside lists what can be typed.

    \b
    qwen2vl chat --image receipt.png
    """
    params = options.sampling_params(given)
    opened = options.open_model(given)
    options.say_if_greedy(opened.llm, params)
    terminal.note(f"{opened.name} is ready; /image PATH shows a picture, /help lists the rest")
    talk = Chat(opened.llm, params, given["fps"], given["output"])
    for kind, paths in (("image", images), ("video", videos)):
        for path in paths:
            talk.show(kind, path)
    talk.run()
    opened.say_what_it_can()


class Chat:
    """One conversation, and the pictures that wait for its next question."""

    def __init__(
        self, llm: LLM, params: SamplingParams, fps: float | None, output: str | None = None
    ) -> None:
        self.llm = llm
        self.params = params
        self.fps = fps
        self.output = output
        self.messages: list[dict[str, Any]] = []
        self.told = 0  # items whose notes were shown
        self.newest = 0  # the item that boxes of an answer belong to
        self.picture: str | None = None  # its file; None for a clip
        self.waiting: list[dict[str, Any]] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": lambda path: self.show("image", path),
            "/video": lambda path: self.show("video", path),
            "/clear": self._clear,
            "/help": lambda _: terminal.say(HELP),
        }

    def run(self) -> None:
        """Read lines until the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C twice, with nothing typed between.
        """
        interrupted = False
        while True:
            try:
                line = terminal.read_line("> ")
                if line is None or line.strip() in ("/quit", "/exit"):
                    return
                interrupted = False
                self.take(line.strip())
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                terminal.say("")
                terminal.note("stopped; Ctrl-C again leaves")

    def take(self, line: str) -> None:
        """Do what one line says; what cannot be done is said in a line, and nothing is lost."""
        word, _, rest = line.partition(" ")
        try:
            if word in self.commands:
                self.commands[word](rest.strip())
            elif line.startswith("/") and "/" not in word[1:]:
                terminal.note(f"{word} is no command; /help lists them")
            elif line:
                self._ask(line)
        except (InputError, CapacityError) as error:
            terminal.note(f"error: {error}")

    def show(self, kind: Any, path: str) -> None:
        """Check a picture or clip now, and show it with the next question.

        Raises:
            InputError, CapacityError: it cannot be read; nothing has changed.
        """
        if not path:
            raise InputError(f"/{kind} needs a file: /{kind} PATH")
        part = options.media_part(kind, _unquote(path), self.fps)
        probe = self.llm.processor([{"role": "user", "content": [part]}])
        self.waiting.append(part)
        terminal.note(f"{item_line(probe.items[0])}; now ask about it")

    def _ask(self, question: str) -> None:
        """Put the question; it is part of the conversation once its answer has begun."""
        content = [*self.waiting, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self.llm.processor(messages)
        self.llm.check(prompt, self.params)
        say_outlook(self.llm, prompt, told=self.told)
        self.told = len(prompt.items)
        if self.waiting:
            self.newest = len(prompt.items) - len(self.waiting)
            self.picture = self.waiting[0].get("image")
        writer = terminal.Writer()
        try:
            (completion,) = self.llm.generate(prompt, self.params, on_delta=writer)
            found = boxes.find(completion.text, completion.items[self.newest :])
            for shape in found:
                terminal.say(shape.text)
            if found and self.output and self.picture:
                boxes.draw(self.picture, found, self.output, self.llm.processor)
            options.say_if_cut(self.llm, self.params, completion)
        finally:
            if writer.text:
                self.messages = [*messages, {"role": "assistant", "content": writer.text}]
                self.waiting = []

    def _clear(self, _: str) -> None:
        self.messages, self.waiting, self.told, self.newest = [], [], 0, 0
        self.picture = None
        terminal.note("the conversation is forgotten")


def _unquote(path: str) -> str:
    """Take the quotes off that a shell would have taken, and that dragging a file types."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return path[1:-1]
    return path
