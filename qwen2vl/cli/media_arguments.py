"""Images and videos of a command line: positional files, --image and --video, globs and stdin.

Files are used in the order of the command line, whichever way they are given. A name with `*`, `?`
or `[` that is no file is a pattern, for shells that do not expand it; its files are sorted by the
numbers in their names. `-` reads one file from stdin. Without a flag the kind of a file follows
from its first bytes, else from its extension; an animation (GIF, WebP, APNG) is a video.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.errors import InputError, abbreviate
from qwen2vl.processor.image_formats.formats import IMAGE_FORMATS, IMAGE_SUFFIXES, list_formats

if TYPE_CHECKING:
    from qwen2vl.processor.content import Modality
    from qwen2vl.processor.media.source import Media

__all__ = [
    "MediaFile",
    "MediaOption",
    "expand_media",
    "folder_remedy",
    "is_url",
    "latest_media",
    "natural_key",
    "read_media_arguments",
    "split_file_names",
    "split_question",
]

STDIN = "-"
_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+://|data:)", re.IGNORECASE)
# Extensions decide only for URLs, for names of files that do not exist, and for MPEG-TS, which has
# no magic bytes. The table of `mimetypes` differs between machines.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".mpg", ".mpeg")
VIDEO_SUFFIXES += (".ts", ".m2ts", ".wmv", ".ogv")
_GIVEN = "qwen2vl.media"  # key of the click context: the occurrences of --image and --video


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaFile:
    """One image or video of a prompt: its kind, and its path, URL or bytes."""

    kind: Modality
    source: str | bytes

    def to_part(self, video_options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content part of a message; the options apply to a video."""
        options = video_options if self.kind == "video" else {}
        return {"type": self.kind, self.kind: self.source, **options}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Occurrence:
    """One use of --image or --video, or a positional argument."""

    num_positionals: int  # up to here; of a positional argument its own number
    kind: Modality | None  # None: a positional argument
    path: str


class MediaOption(click.Option):
    """Click option whose occurrences are recorded with their place on the command line."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add the option, and record each use of it in the context."""
        super().add_to_parser(parser, ctx)
        given: list[_Occurrence] = ctx.meta.setdefault(_GIVEN, [])
        flag = self.opts[0]
        kind: Modality = "video" if flag == "--video" else "image"
        # click returns the values of each option apart from the others and from the positional
        # arguments; only its parser sees the order.
        parsed = parser._long_opt[flag]
        process = parsed.process

        def record(value: Any, state: Any) -> None:
            given.append(
                _Occurrence(num_positionals=len(state.largs), kind=kind, path=os.fspath(value))
            )
            process(value, state)

        parsed.process = record


def split_question(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Split the positional arguments of `ask` into files and the question, which is the last.

    Raises:
        UsageError: there is no question, or the words of one were not quoted.
    """
    if not arguments:
        raise click.UsageError("Missing argument 'QUESTION'.", click.get_current_context())
    *files, question = arguments
    if not question.strip():
        raise click.UsageError("QUESTION is empty; give a text")
    if os.path.isdir(os.path.expanduser(question)):
        raise click.UsageError(
            f"the question is missing: {question!r} is a folder; {folder_remedy(question)}"
        )
    if _is_media_name(question):
        others = [name for name in files if not _names_files(name)]
        if len(others) == 1:
            words = [*(name for name in arguments if name != others[0]), others[0]]
            raise click.UsageError(
                f"the question comes last; write: qwen2vl ask {' '.join(map(shlex.quote, words))}"
            )
        shown = " ".join(map(shlex.quote, arguments))
        raise click.UsageError(
            f'the question is missing: {question!r} is a file; write {shown} "What is this?"'
        )
    for number, name in enumerate(files):
        if not _is_given_file(name) and not Path(name).suffix and not glob.has_magic(name):
            raise click.UsageError(
                f"{name!r} is no file; put a question of several words in quotes: "
                f'"{" ".join(arguments[number:])}"'
            )
    return files, question


def read_media_arguments(positionals: Sequence[str] = ()) -> list[MediaFile]:
    """Return the images and videos of the command line, in its order.

    Args:
        positionals: the files given without a flag.

    Raises:
        InputError: a file is missing, of the wrong kind, or stdin is used twice.
    """
    given: list[_Occurrence] = list(click.get_current_context().meta.get(_GIVEN, []))
    for number, path in enumerate(positionals, 1):
        given.append(_Occurrence(num_positionals=number, kind=None, path=path))
    given.sort(key=lambda use: (use.num_positionals, use.kind is not None))
    if sum(use.path == STDIN for use in given) > 1:
        raise click.UsageError("- is given twice, but stdin can be read once; give one -")
    return [file for use in given for file in expand_media(use.kind, use.path)]


def expand_media(kind: Modality | None, path: str, *, flag: str = "") -> list[MediaFile]:
    """Return the file of a path or URL, or the files that match a pattern, naturally sorted.

    Args:
        kind: what the user says it is; None: detected.
        path: a path, a URL, a pattern, or `-` for stdin.
        flag: by which it was given, for errors; "": by --image or --video.

    Raises:
        InputError: no such file, a folder, no match, or a file of another kind.
    """
    flag = flag or (f"--{kind}" if kind else "")
    where = f"{flag} {path}".lstrip()
    if not path:
        raise InputError(f"{flag or 'FILE'}: the file name is empty; give a path or a URL")
    if path == STDIN:
        return [_read_stdin(kind, flag)]
    if _URL.match(path):
        return [MediaFile(kind=kind or _kind_of_url(path), source=path)]
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        raise InputError(f"{where}: is a folder; {folder_remedy(path, kind)}")
    if not os.path.lexists(expanded) and glob.has_magic(expanded):
        matches = [name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name)]
        if not matches:
            raise InputError(f"{where}: no file matches this pattern; check the folder and name")
        return [_open_file(kind, name, flag) for name in sorted(matches, key=natural_key)]
    return [_open_file(kind, path, flag)]


def latest_media(messages: list[dict[str, Any]]) -> tuple[list[MediaFile], int]:
    """Return the media of the last message that has any, which boxes of an answer refer to.

    Also returns how many images and videos come before them in the conversation.
    """
    from qwen2vl.processor.content import MediaPart
    from qwen2vl.processor.messages import parse_messages

    files: list[MediaFile] = []
    first = total = 0
    for message in parse_messages(messages):
        found = [part for part in message.parts if isinstance(part, MediaPart)]
        if found:
            files = [MediaFile(kind=part.kind, source=part.source) for part in found]
            first = total
        total += len(found)
    return files, first


def folder_remedy(path: str, kind: Modality | None = None) -> str:
    """Return what to do with a folder that was given in place of a file or a question."""
    if os.path.isfile(os.path.join(os.path.expanduser(path), "config.json")):
        return f"--model {shlex.quote(path)} chooses it as the model"
    pattern = os.path.join(path, "*.mp4" if kind == "video" else "*.png")
    return f"give its files by a pattern, such as '{pattern}'"


def is_url(source: str) -> bool:
    """Return whether a source is a URL, not a path."""
    return _URL.match(source) is not None


def split_file_names(text: str) -> list[str]:
    """Split what follows a chat command into file names, by the quoting rules of a shell.

    The whole text is one name if there is such a file: names with spaces need no quotes then.
    """
    if os.path.exists(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe in a name, as in Anna's.png
        return [text]


def _open_file(kind: Modality | None, path: str, flag: str) -> MediaFile:
    """Check a file before the model is loaded, and compare its kind with what the user said."""
    try:
        os.stat(os.path.expanduser(path))
    except FileNotFoundError as error:  # found before the import of torch, which takes seconds
        raise InputError(f"file {abbreviate(path, 120)} not found; check the path") from error
    except (OSError, ValueError):
        pass  # read_source tells why
    from qwen2vl.processor.media.source import MediaLimits, read_source

    name = os.path.basename(path) or path
    media = read_source(path, MediaLimits(), name)
    return MediaFile(kind=_resolve_kind(kind, media, path, name, flag), source=path)


def _read_stdin(kind: Modality | None, flag: str) -> MediaFile:
    if sys.stdin.isatty():
        raise InputError("- reads an image or video from stdin; redirect one: `< photo.jpg`")
    content = getattr(sys.stdin, "buffer", io.BytesIO()).read()
    if not content:
        raise InputError("stdin is empty (0 bytes); check the command or file that - reads")
    from qwen2vl.processor.media.source import MediaLimits, read_source

    media = read_source(content, MediaLimits(), "stdin")
    return MediaFile(kind=_resolve_kind(kind, media, STDIN, "stdin", flag), source=content)


def _resolve_kind(kind: Modality | None, media: Media, path: str, name: str, flag: str) -> Modality:
    """Return the kind of an encoded file.

    Raises:
        InputError: it is no image or video, or one where the other was announced.
    """
    from qwen2vl.processor.media.rgb import is_animation
    from qwen2vl.processor.media.sniff import sniff_type
    from qwen2vl.processor.media.source import read_head

    found = sniff_type(read_head(media))
    if found == "application/octet-stream" and _kind_of_suffix(path) == "video":
        found = "video/unknown"  # the processor tries
    family = found.partition("/")[0]
    if kind == "image" and family == "video":
        raise InputError(
            f"{flag} {path}: is a video ({found}); {flag.replace('image', 'video')} {path} "
            "gives it as one"
        )
    if kind == "video" and family == "image" and not is_animation(media, name):
        raise InputError(
            f"{flag} {path}: is an image ({found}); {flag.replace('video', 'image')} {path} "
            "gives it as one"
        )
    if kind:
        return kind
    if family not in ("image", "video"):
        raise InputError(
            f"{name} is neither an image nor a video, but {found}; images are "
            f"{list_formats(IMAGE_FORMATS)}, a video is such as MP4"
        )
    return "video" if family == "video" or is_animation(media, name) else "image"


def _kind_of_url(url: str) -> Modality:
    head = url.partition(",")[0] if url.lower().startswith("data:") else url.partition("?")[0]
    declared = re.match(r"data:(\w+)/", head, re.IGNORECASE)
    family = declared[1].lower() if declared else _kind_of_suffix(head)
    if family not in ("image", "video"):
        raise InputError(
            f"{head:.80}: does not say whether it is an image or a video; give it by --image or "
            "--video"
        )
    return "video" if family == "video" else "image"


def _is_media_name(text: str) -> bool:
    """Return whether a text is the name of an image or video, existing or by its extension."""
    if text == STDIN:
        return True
    if _kind_of_suffix(text) and not re.search(r"\s", text):
        return True
    path = Path(os.path.expanduser(text))
    with suppress(OSError, ValueError):  # a long text, or one with a null character
        if path.is_file():
            from qwen2vl.processor.media.sniff import sniff_type
            from qwen2vl.processor.media.source import Media, read_head

            found = sniff_type(read_head(Media(content=path)))
            return found.startswith(("image/", "video/"))
    return False


def _kind_of_suffix(name: str) -> Modality | None:
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def _names_files(name: str) -> bool:
    """Return whether a text is a file, a folder, a pattern with matches, or the name of a media."""
    # A question is a pattern, too: most end in a question mark.
    return _is_given_file(name) or _is_media_name(name) or bool(glob.glob(name))


def _is_given_file(name: str) -> bool:
    return name in ("", STDIN) or bool(_URL.match(name)) or os.path.exists(os.path.expanduser(name))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key by which frame2.png comes before frame10.png."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d+)", name)
        if part
    ]
