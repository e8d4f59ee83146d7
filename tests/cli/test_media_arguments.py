"""Files of the command line: order, kinds, globs, stdin, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from qwen2vl.cli import options
from qwen2vl.cli.media_arguments import (
    MediaFile,
    expand_media,
    read_media_arguments,
    split_file_names,
    split_question,
)
from qwen2vl.errors import InputError
from tests import media

Given = list[tuple[str, str | bytes]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with images and videos the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b c.jpg", "f1.png", "f2.png", "f10.png", "[1].png", "no_suffix"):
        Image.new("RGB", (30, 30)).save(name, format="PNG")
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    for name in ("clip.gif", "clip.png", "clip.webp"):
        frames[0].save(name, save_all=True, append_images=frames[1:])
    Path("clip.mp4").write_bytes(media.encoded_video(4))
    Path("renamed.png").write_bytes(media.encoded_video(4))
    Path("page.png").write_text("<!doctype html>")
    Path("stream.ts").write_bytes(b"\x47" + bytes(range(187)))
    Path("sub").mkdir()
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    frames[0].save("pages.tiff", save_all=True, append_images=frames[1:])
    frames[0].save("photo.avif")
    frames[0].save("scan.pgm", "PPM")
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    return tmp_path


def parse(*arguments: str, stdin: bytes = b"") -> tuple[Given, str]:
    """Parse a command line as `ask` does; return the media and the question."""
    found: list[Any] = []

    @click.command()
    @click.argument("arguments", nargs=-1)
    @options.media_input_options
    @click.option("--fps", type=float)
    def command(arguments: tuple[str, ...], **_: Any) -> None:
        names, question = split_question(arguments)
        found.extend([read_media_arguments(names), question])

    result = CliRunner().invoke(command, arguments, input=stdin)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise click.UsageError(result.output)
    files: list[MediaFile] = found[0]
    return [(file.kind, file.source) for file in files], found[1]


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["q?"], []),
        (["a.png", "q?"], ["a.png"]),
        (["a.png", "clip.mp4", "b c.jpg", "q?"], ["a.png", "clip.mp4", "b c.jpg"]),
        (["--video", "clip.mp4", "--image", "a.png", "q?"], ["clip.mp4", "a.png"]),
        (["--image", "a.png", "q?", "--video=clip.mp4"], ["a.png", "clip.mp4"]),
        (
            ["f1.png", "--video", "clip.mp4", "f2.png", "--fps", "1", "--image", "a.png", "q?"],
            ["f1.png", "clip.mp4", "f2.png", "a.png"],
        ),
        (["f*.png", "a.png", "q?"], ["f1.png", "f2.png", "f10.png", "a.png"]),
        (["--image", "f[12]*.png", "q?"], ["f1.png", "f2.png", "f10.png"]),
        (["[1].png", "q?"], ["[1].png"]),
    ],
)
def test_files_are_in_the_order_of_the_command_line(arguments: list[str], files: list[str]) -> None:
    given, question = parse(*arguments)
    assert [source for _, source in given] == files
    assert question == "q?"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a.png", "image"),
        ("no_suffix", "image"),
        ("renamed.png", "video"),
        ("clip.mp4", "video"),
        ("clip.gif", "video"),
        ("clip.png", "video"),
        ("clip.webp", "video"),
        ("pages.tiff", "image"),
        ("photo.avif", "image"),
        ("photo.heic", "image"),  # the processor says what to do
        ("scan.pgm", "image"),
        ("https://example.org/a.avif", "image"),
        ("stream.ts", "video"),
        ("https://example.org/a.jpg?size=1", "image"),
        ("https://example.org/a.mp4", "video"),
        ("data:image/png;base64,AAAA", "image"),
    ],
)
def test_the_kind_of_a_file_is_recognized(path: str, kind: str) -> None:
    (file,) = expand_media(None, path)
    assert file == MediaFile(kind=kind, source=path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("image", "none.png", "'none.png' not found"),
        ("image", "", "file name is empty"),
        ("image", "sub", r"--image sub: is a folder; .* 'sub/\*\.png'"),
        ("video", "sub", r"'sub/\*\.mp4'"),
        (None, "model", r"model: is a folder; --model model chooses it as the model"),
        ("image", "x*.png", r"--image x\*\.png: no file matches"),
        ("image", "clip.mp4", r"is a video \(video/mp4\); --video clip\.mp4"),
        ("video", "a.png", r"is an image \(image/png\); --image a\.png"),
        (
            None,
            "page.png",
            r"neither .*, but text/html; images are JPEG, .*, AVIF and PPM, a video",
        ),
        (None, "https://example.org/x", "give it by --image or --video"),
    ],
)
def test_files_that_are_refused(kind: Any, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand_media(kind, path)


def test_an_animation_may_be_given_as_an_image() -> None:
    assert expand_media("image", "clip.gif") == [MediaFile(kind="image", source="clip.gif")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'QUESTION'"),
        (["a.png"], r'the question is missing: .*write a\.png "What is this\?"'),
        (["none.png"], "the question is missing"),
        (["What color?", "b c.jpg"], "comes last; write: qwen2vl ask 'b c.jpg' 'What color\\?'"),
        (["a.png", "Why?", "f1.png"], "qwen2vl ask a.png f1.png 'Why\\?'"),
        (["a.png", "sub"], "the question is missing: 'sub' is a folder; give its files by"),
        (["model"], "'model' is a folder; --model model chooses it as the model"),
        (["a.png", "b c.jpg"], """write a.png 'b c.jpg' "What"""),
        (["no_suffix"], "the question is missing"),
        (["--image", "a.png", "-"], "the question is missing"),
        (["a.png", "What", "is", "this?"], "'What' is no file; .*: \"What is this\\?\""),
        (["-", "--image", "-", "q?"], "- is given twice"),
        ([" "], "QUESTION is empty"),
    ],
)
def test_command_lines_without_a_question(arguments: list[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        parse(*arguments)


@pytest.mark.parametrize("arguments", [["-", "q?"], ["--image", "-", "q?"]])
def test_an_image_from_stdin(arguments: list[str]) -> None:
    content = Path("a.png").read_bytes()
    assert parse(*arguments, stdin=content) == ([("image", content)], "q?")


def test_a_video_from_stdin() -> None:
    content = Path("clip.mp4").read_bytes()
    assert parse("-", "q?", stdin=content) == ([("video", content)], "q?")
    with pytest.raises(InputError, match="--image -: is a video"):
        parse("--image", "-", "q?", stdin=content)


def test_nothing_on_stdin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"stdin is empty \(0 bytes\); check the command or file"):
        parse("-", "q?")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(InputError, match=r"redirect one: `< photo\.jpg`"):
        expand_media(None, "-")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.png", ["a.png"]),
        ("b c.jpg", ["b c.jpg"]),
        ("'b c.jpg' a.png", ["b c.jpg", "a.png"]),
        ('"b c.jpg"', ["b c.jpg"]),
        ("f*.png  a.png", ["f*.png", "a.png"]),
        (r"b\ c.jpg", ["b c.jpg"]),
        ("Anna's.png", ["Anna's.png"]),
    ],
)
def test_file_names_of_chat_commands(text: str, names: list[str]) -> None:
    assert split_file_names(text) == names
