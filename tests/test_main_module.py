"""Tests of qwen2vl.__main__: Ctrl-C while modules are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

MODULE = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except KeyboardInterrupt:
    print("swallowed")
"""


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )


def test_an_interrupt_inside_an_import_ends_the_command(tmp_path: Path) -> None:
    (tmp_path / "swallowing.py").write_text(MODULE)
    code = (
        "import signal; from qwen2vl import __main__ as m; {}; import swallowing; print('went on')"
    )
    unhandled = _run(code.format("pass"), tmp_path)
    assert unhandled.stdout == "swallowed\nwent on\n"
    handled = _run(code.format("signal.signal(signal.SIGINT, m._interrupt)"), tmp_path)
    assert (handled.returncode, handled.stdout) == (130, "")
    assert handled.stderr == "\nqwen2vl: interrupted\n"


def test_an_interrupt_elsewhere_raises_keyboard_interrupt(tmp_path: Path) -> None:
    code = """
import os, signal
from qwen2vl import __main__ as m
signal.signal(signal.SIGINT, m._interrupt)
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except KeyboardInterrupt:
    print("raised")
"""
    assert _run(code, tmp_path).stdout == "raised\n"


def test_a_command_that_is_interrupted_while_it_starts_exits_with_130() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "qwen2vl", "doctor"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "torch._C" in line:  # torch is being imported
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert "interrupted" in rest and "Traceback" not in rest
