"""The command as a process: startup time, one-line errors, exit codes, streams."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl.cli import main as main_module
from qwen2vl.errors import CapacityError, CheckpointError, ConfigError, EngineError, InputError
from tests.cli.conftest import Run

# A 1 x 1 GIF, for tests of what comes after opening it.
IMAGE = "data:image/gif;base64,R0lGODdhAQABAIAAAP///////ywAAAAAAQABAAACAkQBADs="
COMMAND = [sys.executable, "-m", "qwen2vl"]


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def one_error(stderr: str) -> str:
    """Return the only error line; it starts with the program name."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("qwen2vl: error: ")]
    return line


def cpu_seconds() -> float:
    """Return the CPU seconds of terminated child processes, independent of other load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], []])
def test_help_is_fast(arguments: list[str]) -> None:
    times = []
    for _ in range(3):
        before = cpu_seconds()
        done = process(*arguments)
        times.append(cpu_seconds() - before)
        assert done.returncode == 0
        assert "Usage: qwen2vl" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("command", main_module.COMMANDS)
def test_help_of_a_command_does_not_import_torch(command: str) -> None:
    code = (
        "import sys\nfrom qwen2vl.cli.main import main\n"
        f"try:\n    main(['{command}', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    for name, line in main_module.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", result.stdout, re.MULTILINE)


def test_version(run: Run) -> None:
    assert re.fullmatch(r"qwen2vl, version \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'; known: ask, batch, chat, "),
        (["ak", "hi"], "No such command 'ak'; did you mean ask?"),
        (["ask"], "Missing argument 'QUESTION'"),
        (["ask", "hi", "--bogus"], "No such option '--bogus'"),
        (["ask", "hi", "--tempratur", "1"], "'--temperature'?"),
        (["ask", "hi", "--max-tokens", "many"], "'many' is not a valid integer"),
        (["ask", "hi", "--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        (["ask", "hi", "--video-preset", "mine"], "'mine' is not one of"),
        (["ask", "What", "is", "this"], "'What' is no file; put a question of several words in"),
        (["tokens"], "Missing argument 'FILE...'"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_two(
    run: Run, arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in one_error(result.stderr)
    assert "--help shows the options" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no"), 2),
        (CapacityError("no"), 2),
        (ConfigError("no"), 2),
        (CheckpointError("no"), 2),
        (EngineError("no"), 1),
    ],
)
def test_errors_of_the_library_print_their_text(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr("qwen2vl.cli.options.load_processor_from_options", lambda _: _raise(error))
    result = run("tokens", IMAGE)
    assert result.exit_code == code
    assert result.stderr == "qwen2vl: error: no\n"


def test_lines_of_a_message_are_kept_and_indented(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = InputError("the pattern [a\n             ^ is never closed\n")
    monkeypatch.setattr("qwen2vl.cli.options.load_processor_from_options", lambda _: _raise(error))
    lines = run("tokens", IMAGE).stderr.splitlines()
    assert lines == [
        "qwen2vl: error: the pattern [a",
        "               ^ is never closed",
    ]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EACCES, 2)])
def test_a_failure_of_the_machine_is_exit_code_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    def fail(_: object) -> None:
        try:
            raise OSError(number, "no")
        except OSError as error:
            raise CheckpointError("cannot be saved") from error

    monkeypatch.setattr("qwen2vl.cli.options.load_processor_from_options", fail)
    assert run("tokens", IMAGE).exit_code == code


@pytest.mark.parametrize("arguments", [["-h"], ["ask", "-h"], ["train", "-h"], ["tokens", "-h"]])
def test_h_is_help(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_a_file_name_like_an_option_names_the_remedy(run: Run) -> None:
    Path("-x.png").touch()
    result = run("ask", "-x.png", "What is this?")
    assert result.exit_code == 2
    assert "is given as ./-x.png" in one_error(result.stderr)


def test_unexpected_exceptions_are_one_line_without_debug(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("two\nlines")
    monkeypatch.setattr("qwen2vl.cli.options.load_processor_from_options", lambda _: _raise(error))
    result = run("tokens", IMAGE)
    assert result.exit_code == 1
    assert result.stderr == (
        "qwen2vl: error: RuntimeError: two lines; this is a bug of qwen2vl: "
        "run again with --debug\n"
    )
    assert run("tokens", IMAGE, "--debug").exception is error
    assert run("--debug", "tokens", IMAGE).exception is error


def _raise(error: Exception) -> str:
    raise error


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl.cli.options.load_processor_from_options", _interrupt)
    result = run("tokens", IMAGE)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def _reset_sigint() -> None:
    """Restore the default SIGINT handler: children of background jobs inherit SIG_IGN."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_sigint_during_generation_exits_with_130(tiny_folder: Path) -> None:
    arguments = ["ask", "--model", str(tiny_folder), "hi", "--max-tokens", "30000"]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_reset_sigint,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1), "the answer streams"
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in stderr


def test_a_closed_output_pipe_is_exit_code_zero(tiny_folder: Path) -> None:
    arguments = ["ask", "--model", str(tiny_folder), "hi", "--max-tokens", "3000"]
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        stderr = child.stderr.read()
        assert child.wait(timeout=60) == 0
    assert b"Traceback" not in stderr
    assert b"BrokenPipe" not in stderr


def test_a_closed_stdout_is_exit_code_zero(tiny_folder: Path, image_file: Path) -> None:
    shell = f'"{sys.executable}" -m qwen2vl tokens --model "{tiny_folder}" "{image_file}" >&-'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"NO_COLOR": "1", "COLUMNS": "20", "TERM": "dumb"}, "\u00e9 \u56fe.png"),
        ({"PYTHONIOENCODING": "ascii"}, "\\xe9 \\u56fe.png"),
        pytest.param(
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "file     image 1",  # the name has no characters in this locale
            marks=pytest.mark.slow,
        ),
    ],
)
def test_unencodable_characters_are_escaped(
    environment: dict[str, str], shown: str, tiny_folder: Path, image_file: Path
) -> None:
    named = image_file.rename(image_file.with_name("\u00e9 \u56fe.png"))
    done = process("tokens", "--model", str(tiny_folder), str(named), **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert shown in done.stdout
