"""Formatting of durations and sizes, and escaping of control characters."""

from __future__ import annotations

import os
import pty
import select
import sys
import time

import pytest

from qwen2vl.cli import terminal
from qwen2vl.cli.terminal import escape_control_characters, format_duration, format_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.24, "0.2 s"),
        (1.4, "1 s"),
        (15.2, "15 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (600.0, "10 min"),
        (5399.0, "90 min"),
        (7300.0, "2 h"),
    ],
)
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_progress_in_a_pipe_is_a_note_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.progress_bar() as update:
        for number in range(1, 131):
            now += 1.0
            update(f"layer {number}", number, 1300)
    assert capsys.readouterr().err.splitlines() == [
        "qwen2vl: 30 of 1,300 after 30 s: layer 30",
        "qwen2vl: 60 of 1,300 after 60 s: layer 60",
        "qwen2vl: 90 of 1,300 after 2 min: layer 90",
        "qwen2vl: 120 of 1,300 after 2 min: layer 120",
    ]


@pytest.mark.parametrize(
    ("keys", "outcome"),
    [(b"half\x03", "''"), (b"\x03", "KeyboardInterrupt"), (b"half\x03\x03", "KeyboardInterrupt")],
)
def test_ctrl_c_clears_a_half_typed_line(keys: bytes, outcome: str) -> None:
    """On a real terminal, because readline keeps the typed text; a second one is no typed line."""
    script = (
        "import sys\nfrom qwen2vl.cli import terminal\n"
        "try:\n    lines = [terminal.read_line('> ') for _ in range(int(sys.argv[1]))]\n"
        "    print('got', repr(lines[-1]))\n"
        "except KeyboardInterrupt:\n    print('got KeyboardInterrupt')\n"
    )
    command = [sys.executable, "-c", script, str(keys.count(b"\x03"))]
    process, terminal_fd = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    shown = read_until(terminal_fd, b"> ")
    for part in keys.split(b"\x03")[:-1]:
        os.write(terminal_fd, part)
        read_until(terminal_fd, part)
        time.sleep(0.2)  # a signal just before readline waits is seen only at the next key
        os.write(terminal_fd, b"\x03")
        shown += read_until(terminal_fd, b"> ", b"got")
    shown += read_until(terminal_fd, outcome.encode())
    os.waitpid(process, 0)
    os.close(terminal_fd)
    assert f"got {outcome}".encode() in shown


def read_until(terminal_fd: int, *ends: bytes) -> bytes:
    """Read what a process shows until one of the texts appears, or the process ends."""
    shown = b""
    while not any(end in shown for end in ends):
        ready, _, _ = select.select([terminal_fd], [], [], 20)
        assert ready, f"waited 20 s for {ends}, got {shown!r}"
        try:
            shown += os.read(terminal_fd, 1024)
        except OSError:  # Linux's end of a terminal whose process has ended
            break
    return shown


def test_sizes_are_width_first() -> None:
    assert format_size((3024, 4032)) == "4032 x 3024"


def test_escape_sequences_become_visible() -> None:
    assert escape_control_characters("\x1b[2Jhi\n\u56fe") == "\\x1b[2Jhi\\n\u56fe"
    assert escape_control_characters("\x1b[2Jhi\n\t", keep="\n\t") == "\\x1b[2Jhi\n\t"
