"""`qwen2vl chat`: interactive multi-turn conversation about images and videos.

Lines that begin with / are commands (/help lists them); every other line is a user message. Ctrl-C
stops the generation and keeps the partial answer in the conversation; a second Ctrl-C, without
input in between, exits with code 130. An invalid turn is reported and dropped; the conversation is
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import boxes, options, terminal
from qwen2vl.cli.prompt_summary import format_item, print_prompt_summary
from qwen2vl.errors import CapacityError, InputError

if TYPE_CHECKING:
    from qwen2vl.engine import LLM, SamplingParams

__all__ = ["ChatSession", "chat"]

HELP = """\
/image PATH   attach an image to the next message
/video PATH   attach a video to the next message
/clear        clear the conversation
/help         show this list
/quit         exit (as Ctrl-D does)
Ctrl-C stops the generation."""


@click.command()
@options.media_input_options
@options.model_options
@options.sampling_options
@options.media_preprocessing_options
@click.option(
    "-o", "--output", metavar="PNG", help="Draw an answer's boxes on its image, write it here."
)
@terminal.debug_option
def chat(images: tuple[str, ...], videos: tuple[str, ...], **given: Any) -> None:
    """Chat about images and videos in several turns; /help lists the commands of the chat.

    \b
    qwen2vl chat --image receipt.png
    """
    params = options.sampling_params_from_options(given)
    loaded = options.load_model_from_options(given)
    options.note_ignored_sampling_options(loaded.llm, params)
    terminal.note(
        f"{loaded.name} is ready; /image PATH attaches an image, /help lists the commands"
    )
    session = ChatSession(loaded.llm, params, given["fps"], given["output"])
    for kind, paths in (("image", images), ("video", videos)):
        for path in paths:
            session.attach(kind, path)
    session.run()
    loaded.note_capabilities()


class ChatSession:
    """One conversation, and the images and videos attached to its next message."""

    def __init__(
        self, llm: LLM, params: SamplingParams, fps: float | None, output: str | None = None
    ) -> None:
        self.llm = llm
        self.params = params
        self.fps = fps
        self.output = output
        self.messages: list[dict[str, Any]] = []
        self.num_noted_items = 0  # items whose notes were already written
        self.first_new_item = 0  # index of the item that boxes of an answer refer to
        self.image_path: str | None = None  # file of that item; None for a video
        self.pending_media: list[dict[str, Any]] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": lambda path: self.attach("image", path),
            "/video": lambda path: self.attach("video", path),
            "/clear": self._clear,
            "/help": lambda _: terminal.echo(HELP),
        }

    def run(self) -> None:
        """Read and handle lines until the end of the input.

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
                self.handle_line(line.strip())
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                terminal.echo("")
                terminal.note("stopped; Ctrl-C again leaves")

    def handle_line(self, line: str) -> None:
        """Run a command or send a message; an error is reported and changes nothing."""
        command, _, argument = line.partition(" ")
        try:
            if command in self.commands:
                self.commands[command](argument.strip())
            elif line.startswith("/") and "/" not in command[1:]:
                terminal.note(f"{command} is no command; /help lists them")
            elif line:
                self._send(line)
        except (InputError, CapacityError) as error:
            terminal.note(f"error: {error}")

    def attach(self, kind: Any, path: str) -> None:
        """Preprocess an image or video to validate it, and attach it to the next message.

        Raises:
            InputError, CapacityError: it cannot be read; nothing has changed.
        """
        if not path:
            raise InputError(f"/{kind} needs a file: /{kind} PATH")
        part = options.content_part(kind, _strip_quotes(path), self.fps)
        prompt = self.llm.processor([{"role": "user", "content": [part]}])
        self.pending_media.append(part)
        terminal.note(f"{format_item(prompt.items[0])}; now ask about it")

    def _send(self, question: str) -> None:
        """Send a user message; it joins the conversation once its answer has begun."""
        content = [*self.pending_media, {"type": "text", "text": question}]
        messages = [*self.messages, {"role": "user", "content": content}]
        prepared = self.llm.prepare(messages, self.params)
        prompt = prepared.prompt
        print_prompt_summary(self.llm, prompt, num_noted_items=self.num_noted_items)
        self.num_noted_items = len(prompt.items)
        if self.pending_media:
            self.first_new_item = len(prompt.items) - len(self.pending_media)
            self.image_path = self.pending_media[0].get("image")
        writer = terminal.DeltaWriter()
        try:
            with writer.interrupts_between_steps():
                (completion,) = self.llm.generate_prepared(
                    [prepared], on_delta=writer, on_step=writer.raise_if_interrupted
                )
            shapes = boxes.parse_shapes(completion.text, completion.items[self.first_new_item :])
            for shape in shapes:
                terminal.echo(shape.text)
            if shapes and self.output and self.image_path:
                boxes.save_annotated_image(self.image_path, shapes, self.output, self.llm.processor)
            options.note_truncation(self.llm, self.params, completion)
        finally:
            if writer.text:
                self.messages = [*messages, {"role": "assistant", "content": writer.text}]
                self.pending_media = []

    def _clear(self, _: str) -> None:
        self.messages, self.pending_media, self.num_noted_items, self.first_new_item = [], [], 0, 0
        self.image_path = None
        terminal.note("the conversation is cleared")


def _strip_quotes(path: str) -> str:
    """Remove the quotes that a shell would remove, as added by dragging a file to a terminal."""
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return path[1:-1]
    return path
