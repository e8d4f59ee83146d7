"""Confinement: what a process may still do afterwards. Each check runs in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock")

IMPORT = "from qwen2vl.processor.media_worker import confinement as c; import os, socket, time\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", IMPORT + code], capture_output=True, text=True, timeout=60
    )


def test_no_network() -> None:
    done = run(
        "achieved = c.isolate_network()\n"
        "try:\n"
        "    socket.create_connection(('127.0.0.1', 1), 1)\n"
        "except OSError as error:\n"
        "    print(achieved, error.errno)"
    )
    if done.stdout.startswith("[]"):
        pytest.skip("namespaces are not allowed here")
    assert done.stdout == "['no network'] 101\n", done.stderr  # ENETUNREACH: not even loopback


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "module").write_text("readable")
    done = run(
        f"achieved = c.lock_files([{str(tmp_path / 'modules')!r}])\n"
        f"print(achieved, open({str(tmp_path / 'modules' / 'module')!r}).read())\n"
        f"for path, mode in (({str(tmp_path / 'secret')!r}, 'r'), ('/etc/passwd', 'r'), "
        f"({str(tmp_path / 'modules' / 'new')!r}, 'w')):\n"
        "    try:\n"
        "        open(path, mode)\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
        "try:\n"
        "    os.execv('/bin/sh', ['sh'])\n"
        "except PermissionError:\n"
        "    print('refused')"
    )
    if done.stdout.startswith("[]"):
        pytest.skip("no Landlock here")
    assert done.stdout.startswith("['no files but those of its packages'] readable\n"), done.stderr
    assert done.stdout.count("refused") == 4


def test_resource_limits(tmp_path: Path) -> None:
    done = run(
        f"file = open({str(tmp_path / 'a')!r}, 'wb', 0)\n"
        "c.limit_resources(1 << 30, 3)\n"
        "print(os.nice(0))\n"
        "for call in (lambda: file.write(b'x'), lambda: bytes(1 << 30)):\n"
        "    try:\n"
        "        call()\n"
        "    except (OSError, MemoryError) as error:\n"
        "        print(type(error).__name__)"
    )
    assert done.stdout.split() == ["3", "OSError", "MemoryError"], done.stderr


def test_cpu_limit() -> None:
    done = run("c.limit_cpu_seconds(0.2)\nwhile True: pass")
    assert done.returncode == -signal.SIGXCPU


def test_a_parent_that_has_ended() -> None:
    assert run("c.die_with_parent(1 << 30)\nprint('alive')").returncode == 1
    assert run("c.die_with_parent(os.getppid())\nprint('alive')").stdout == "alive\n"
