"""The command as a process: help is instant, failures are one line, exit codes mean something."""

from __future__ import annotations

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
    """The rule: one line, and which program it comes from."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("qwen2vl: error: ")]
    return line


def computed() -> float:
    """Seconds that processes we waited for have computed: others' work does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], []])
def test_help_is_instant(arguments: list[str]) -> None:
    times = []
    for _ in range(3):
        before = computed()
        done = process(*arguments)
        times.append(computed() - before)
        assert done.returncode == 0
        assert "Usage: qwen2vl" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("command", main_module.COMMANDS)
def test_no_command_imports_torch_to_explain_itself(command: str) -> None:
    code = (
        "import sys\nfrom qwen2vl.cli.main import main\n"
        f"try:\n    main(['{command}', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_is_listed_with_its_line(run: Run) -> None:
    result = run("--help")
    for name, line in main_module.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", result.stdout, re.MULTILINE)


def test_version(run: Run) -> None:
    assert re.fullmatch(r"qwen2vl, version \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["ask"], "Missing argument 'QUESTION'"),
        (["ask", "hi", "--bogus"], "No such option '--bogus'"),
        (["ask", "hi", "--max-tokens", "many"], "'many' is not a valid integer"),
        (["ask", "hi", "--dtype", "int8"], "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
        (["ask", "hi", "--preset", "mine"], "'mine' is not one of"),
        (["ask", "one", "two"], "Got unexpected extra argument (two)"),
        (["tokens"], "Missing argument 'FILE'"),
    ],
)
def test_wrong_usage_is_one_line_and_two(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in one_error(result.stderr)
    assert "--help shows the options" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no"), 2),
        (CapacityError("no"), 2),
        (ConfigError("no"), 2),
        (CheckpointError("no"), 1),
        (EngineError("no"), 1),
    ],
)
def test_our_errors_are_their_text(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    monkeypatch.setattr("qwen2vl.cli.options.open_processor", lambda _: _raise(error))
    result = run("tokens", "x.png")
    assert result.exit_code == code
    assert result.stderr == "qwen2vl: error: no\n"


def test_a_bug_is_one_line_unless_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("two\nlines")
    monkeypatch.setattr("qwen2vl.cli.options.open_processor", lambda _: _raise(error))
    result = run("tokens", "x.png")
    assert result.exit_code == 1
    assert result.stderr == (
        "qwen2vl: error: RuntimeError: two lines; this is a bug of qwen2vl: "
        "run again with --debug\n"
    )
    assert run("tokens", "x.png", "--debug").exception is error
    assert run("--debug", "tokens", "x.png").exception is error


def _raise(error: Exception) -> str:
    raise error


def _interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl.cli.options.open_processor", _interrupt)
    result = run("tokens", "x.png")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def _heed_interrupts() -> None:
    """Undo what a shell does to its background jobs, whose children ignore SIGINT from birth."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_interrupt_while_an_answer_is_written(tiny_folder: Path) -> None:
    arguments = ["ask", "--model", str(tiny_folder), "hi", "--max-tokens", "30000"]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_heed_interrupts,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1), "the answer streams"
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"Traceback" not in stderr


def test_a_reader_who_leaves_is_no_failure(tiny_folder: Path) -> None:
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


def test_a_closed_stdout_is_no_failure(tiny_folder: Path, picture: Path) -> None:
    shell = f'"{sys.executable}" -m qwen2vl tokens --model "{tiny_folder}" "{picture}" >&-'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"NO_COLOR": "1", "COLUMNS": "20", "TERM": "dumb"}, "\u00e9 \u56fe.png"),
        ({"PYTHONIOENCODING": "ascii"}, "\\xe9 \\u56fe.png"),
        (
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            "\\udcc3\\udca9 \\udce5\\udc9b\\udcbe.png",
        ),
    ],
)
def test_poor_terminals_lose_nothing(
    environment: dict[str, str], shown: str, tiny_folder: Path, picture: Path
) -> None:
    named = picture.rename(picture.with_name("\u00e9 \u56fe.png"))
    done = process("tokens", "--model", str(tiny_folder), str(named), **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert shown in done.stdout
