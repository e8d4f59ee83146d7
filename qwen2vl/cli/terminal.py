"""Terminal output of the commands: stdout and stderr, tables, spinner, progress bar, formatting.

Results are written to stdout, notes and errors to stderr, so that the output can be piped. Only
plain ASCII decoration is used, for narrow, colorless and non-UTF-8 terminals. Text from a model or
a file is escaped where it could contain terminal control sequences.
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from rich.console import Console

from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "DeltaWriter",
    "NoteHandler",
    "StreamedText",
    "TextConverter",
    "check_image_path",
    "check_parent_folder",
    "debug_option",
    "echo",
    "echo_json",
    "echo_table",
    "escape_control_characters",
    "format_bytes",
    "format_duration",
    "format_size",
    "has_pasted_line",
    "note",
    "prepare_streams",
    "progress_bar",
    "read_line",
    "save_image",
    "spinner",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")

LINE_BREAK = "\n"
PASTE_SECONDS = 0.02  # far below the time between two lines that are typed
MAX_TABLE_WIDTH = 400  # characters, where stdout is not a terminal: no cell is broken
SECONDS_PER_NOTE = 30.0  # of progress where stderr is not a terminal

F = TypeVar("F", bound=Callable[..., Any])


def prepare_streams() -> None:
    """Escape invalid bytes and unencodable characters, and replace closed streams by devnull."""
    # A closed stream is None, and every use of it would raise an exception.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for the whole process, as these:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class NoteHandler(logging.Handler):
    """Logging handler that writes the warnings of the library as notes to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record."""
        note(record.getMessage())


def echo(text: str, *, end: str = "\n") -> None:
    """Write text to stdout and flush it."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def read_line(prompt: str) -> str | None:
    """Read a line from stdin, with a prompt on a terminal; None at the end of the input.

    Raises:
        KeyboardInterrupt: Ctrl-C with nothing typed. After a half-typed line it only clears that:
            the line is empty.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        import readline  # also enables line editing and history in input()
    except ImportError:
        readline = None
    try:
        return input(prompt)
    except KeyboardInterrupt:
        if readline is None or not readline.get_line_buffer():
            raise
        echo("")
        return ""
    except EOFError:
        echo("")
        return None


def has_pasted_line() -> bool:
    """Return whether a terminal has another line already: several lines were pasted at once."""
    if not sys.stdin.isatty():
        return False
    with suppress(OSError, ValueError):  # select takes no terminals on Windows
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    return False


def echo_json(value: object) -> None:
    """Write one JSON value to stdout, with JSON escapes where the encoding is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    echo(json.dumps(value, ensure_ascii=not is_utf8))


def echo_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, left_aligned: Collection[str]
) -> None:
    """Write a table to stdout; columns are right-aligned unless in `left_aligned`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.ASCII)
    for title in titles:
        table.add_column(
            title,
            justify="left" if title in left_aligned else "right",
            overflow="fold",
            # Names are not broken: scripts search for them.
            no_wrap=title == titles[0] or not sys.stdout.isatty(),
        )
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else MAX_TABLE_WIDTH
    Console(width=width, markup=False, highlight=False).print(table)


def note(text: str) -> None:
    """Write a text to stderr, prefixed by the program name; further lines are indented."""
    sys.stdout.flush()
    sys.stderr.write(f"qwen2vl: {text.replace(LINE_BREAK, LINE_BREAK + '  ')}\n")
    sys.stderr.flush()


@contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show a spinner with a text on stderr, if it is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what, spinner="line"):
        yield


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr: `update(name, done, total)`.

    Where stderr is not a terminal, a note is written every SECONDS_PER_NOTE.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_notes()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as p:
        bar = p.add_task("", total=None)
        yield lambda name, done, total: p.update(bar, description=name, completed=done, total=total)


def _progress_notes() -> Callable[[str, int, int], None]:
    start = last = time.monotonic()

    def update(name: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_PER_NOTE:
            last = now
            note(f"{done:,} of {total:,} after {format_duration(now - start)}: {name}")

    return update


def escape_control_characters(text: str, keep: str = "") -> str:
    """Escape control characters, so that a text cannot contain terminal control sequences.

    An image can make a model write any text; `keep` lists control characters to leave unescaped.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def check_image_path(output: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> None:
    """Check before a long computation that the suffix and the folder of an image are valid.

    Raises:
        InputError: the suffix is no image format, or the folder does not exist.
    """
    if Path(output).suffix.lower() not in suffixes:
        raise InputError(f"-o {output}: give a name that ends in {', '.join(suffixes)}")
    check_parent_folder(output)


def check_parent_folder(output: str, flag: str = "-o") -> None:
    """Check before a long computation that the folder of an output file exists.

    Raises:
        InputError: it does not; the message begins with `flag`.
    """
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{flag} {output}: the folder {folder} does not exist; make it first")


def save_image(image: Image.Image, output: str) -> None:
    """Write an image to the path given by -o.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        image.save(output)
    except OSError as error:
        raise InputError(f"-o {output}: cannot be written: {error.strerror or error}") from error


def format_bytes(num_bytes: int) -> str:
    """Format a size in bytes: 4.4 GB, 8.8 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:.1f} MB"


def format_duration(seconds: float) -> str:
    """Format a duration, rounded: 15 s, 10 min, 2 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def format_size(size: tuple[int, int]) -> str:
    """Format (height, width) as "width x height"."""
    height, width = size
    return f"{width} x {height}"


def debug_option(command: F) -> F:
    """Add --debug."""

    def switch_on(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().command.debug = True  # type: ignore[attr-defined]

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=switch_on,
        help="Show the traceback of an error.",
    )(command)


class StreamedText(Protocol):
    """A piece of a streamed completion: a Delta of the engine, or of a server."""

    @property
    def text(self) -> str:
        """What is new."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """Why the completion ended; set on the last piece."""
        ...


class TextConverter(Protocol):
    """Streaming conversion of the text of a completion for display."""

    def feed(self, delta: str) -> str:
        """Convert a piece of text; return what is complete."""
        ...

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        ...


class DeltaWriter:
    """Streaming callback: writes the text deltas of a request to stdout and ends the last line.

    `text` is the text as generated; what is written goes through the converter.
    """

    def __init__(self, converter: TextConverter | None = None) -> None:
        self.text = ""
        self._converter = converter
        self._shown = ""
        self._is_interrupted = False

    def __call__(self, delta: StreamedText) -> None:
        """Write one text delta."""
        self.text += delta.text
        shown = self._converter.feed(delta.text) if self._converter else delta.text
        is_last = delta.finish_reason is not None
        if is_last and self._converter:
            shown += self._converter.finish()
        self._shown = (self._shown + shown)[-1:]
        if sys.stdout.isatty():
            shown = escape_control_characters(shown, keep="\n\t")
        echo(shown, end="\n" if is_last and self._shown != "\n" else "")

    def raise_if_interrupted(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C within `interrupts_between_steps`."""
        if self._is_interrupted:
            raise KeyboardInterrupt

    @contextmanager
    def interrupts_between_steps(self) -> Iterator[None]:
        """Let Ctrl-C take effect after the engine step, and a second one at once.

        The engine calls `raise_if_interrupted` after each step.

        An interrupt inside an engine step costs the engine its caches (engine/engine_core.py),
        which the next turn of a chat needs; between steps it costs nothing.
        """

        def record(*_: object) -> None:
            self._is_interrupted = True
            signal.signal(signal.SIGINT, previous)

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can set signal handlers
            return
        previous = signal.signal(signal.SIGINT, record)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)
        self.raise_if_interrupted()
