"""What the commands share: two streams, one spinner, and options that mean the same everywhere.

Answers go to stdout, everything said about them to stderr, so that output can be piped. Plain
text and ASCII only, so that narrow, colorless and non-UTF-8 terminals lose nothing. It must not
know any command. Next room: ask.py.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console

from qwen2vl.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from qwen2vl.engine import Delta

__all__ = [
    "NoteHandler",
    "Writer",
    "check_folder_of",
    "check_picture_name",
    "debug_option",
    "note",
    "person_bytes",
    "person_seconds",
    "person_size",
    "plain",
    "prepare_streams",
    "progress",
    "read_line",
    "save_picture",
    "say",
    "say_json",
    "say_table",
    "waiting",
]

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")

PIPE_WIDTH = 120  # characters of a table where no terminal says how wide it is

F = TypeVar("F", bound=Callable[..., Any])


def prepare_streams() -> None:
    """Never fail for what is read or written: strange bytes and characters become escapes."""
    # A closed stream is None, and every use of it would be a crash.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - for the whole process, as these:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class NoteHandler(logging.Handler):
    """Show the library's warnings as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one warning."""
        note(record.getMessage())


def say(text: str, *, end: str = "\n") -> None:
    """Write to stdout, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def read_line(prompt: str) -> str | None:
    """Read a line from stdin, with a prompt where a person types; None at the end."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    try:
        return input(prompt)
    except EOFError:
        say("")
        return None


def say_json(value: object) -> None:
    """Write one JSON value; escapes of our own would not be JSON, so its own are used."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    say(json.dumps(value, ensure_ascii=not is_utf8))


def say_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, words: Collection[str]
) -> None:
    """Write a table to stdout; columns whose titles are in `words` stand left, numbers right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.ASCII)
    for title in titles:
        table.add_column(title, justify="left" if title in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width, markup=False, highlight=False).print(table)


def note(text: str) -> None:
    """Write one line to stderr."""
    sys.stdout.flush()
    sys.stderr.write(f"qwen2vl: {text}\n")
    sys.stderr.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something is going on, where a person is watching."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what, spinner="line"):
        yield


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far something is, where a person is watching: `step(name, done, total)`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as p:
        bar = p.add_task("", total=None)
        yield lambda name, done, total: p.update(bar, description=name, completed=done, total=total)


def plain(text: str, keep: str = "") -> str:
    """Keep an answer from steering the terminal: control characters become escapes.

    A picture can make a model write anything; `keep` are control characters that may pass.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def check_picture_name(output: str) -> None:
    """Find out before the work whether `save_picture` can succeed.

    Raises:
        InputError: the ending is of no picture, or the folder does not exist.
    """
    if Path(output).suffix.lower() not in PICTURE_ENDINGS:
        raise InputError(f"-o {output}: give a name that ends in {', '.join(PICTURE_ENDINGS)}")
    check_folder_of(output)


def check_folder_of(output: str) -> None:
    """Find out before the work whether there is a folder for what will be written.

    Raises:
        InputError: there is none.
    """
    folder = Path(output).absolute().parent
    if not folder.is_dir():
        raise InputError(f"-o {output}: the folder {folder} does not exist; make it first")


def save_picture(picture: Image.Image, output: str) -> None:
    """Write a picture where the user said.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        picture.save(output)
    except OSError as error:
        raise InputError(f"-o {output}: cannot be written: {error.strerror or error}") from error


def person_bytes(num_bytes: int) -> str:
    """Write a size with its unit: 4.4 GB, 8.8 MB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e9 else f"{num_bytes / 1e6:.1f} MB"


def person_seconds(seconds: float) -> str:
    """Round a duration as one would say it: 15 s, 10 min, 2 h."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def person_size(size: tuple[int, int]) -> str:
    """Write (height, width) as people do, width first."""
    height, width = size
    return f"{width} x {height}"


def debug_option(command: F) -> F:
    """Add --debug, which every command understands."""

    def switch_on(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().command.debug = True  # type: ignore[attr-defined]

    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=switch_on,
        help="Show the traceback of a failure.",
    )(command)


class Writer:
    """Write an answer on stdout as it comes, and end its last line."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, delta: Delta) -> None:
        """Write one piece."""
        self.text += delta.text
        ends = delta.finish_reason is not None and not self.text.endswith("\n")
        shown = plain(delta.text, keep="\n\t") if sys.stdout.isatty() else delta.text
        say(shown, end="\n" if ends else "")
