"""Compilation of the kernels: once, into the cache, and a clear reason where it cannot be done."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.linear.cpu import build as build_module
from qwen2vl.linear.cpu import library
from qwen2vl.linear.cpu.build import BuildError, build
from qwen2vl.linear.cpu.library import (
    INSTRUCTION_SETS,
    VARIABLE,
    describe_kernels,
    load_kernels,
)

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo 1; exit; fi
echo called >> "{log}"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a file and a log; the cache is empty."""
    program, log = tmp_path / "compiler", tmp_path / "log"
    program.write_text(COMPILER.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return program


def test_it_is_compiled_once(compiler: Path, tmp_path: Path) -> None:
    first = build()
    assert first.read_text() == "library\n"
    assert first.parent == tmp_path / "cache" / "qwen2vl" / "kernels"
    assert build() == first
    assert (tmp_path / "log").read_text() == "called\n"


def test_another_compiler_or_source_is_another_file(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build()
    compiler.write_text(compiler.read_text().replace("echo 1;", "echo 2;"))
    second = build()
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.cpp").write_text("int x;")
    monkeypatch.setattr(build_module, "SOURCE", source)
    assert len({first, second, build()}) == 3


def test_a_prebuilt_library_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = tmp_path / "kernels.so"
    prebuilt.touch()
    monkeypatch.setattr(build_module, "PREBUILT", prebuilt)
    assert build() == prebuilt


def test_a_library_for_distribution_needs_no_other_library(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text(compiler.read_text().replace("echo called", 'echo "$@"'))
    build_module.build_for_distribution(tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").read_text() == "library\n"
    assert " -static-libstdc++ " in (tmp_path / "log").read_text()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\).*install"):
        build()
    monkeypatch.setenv("CXX", "ccache no-such-compiler")
    with pytest.raises(BuildError, match=r"\(ccache\)"):
        build()


def test_a_compiler_that_fails(compiler: Path, tmp_path: Path) -> None:
    compiler.write_text("#!/bin/sh\necho 'a.h: error: no such file' >&2\nexit 1\n")
    with pytest.raises(BuildError, match=r"failed: a\.h: error: no such file"):
        build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="XDG_CACHE_HOME"):
        build()


def test_one_warning_says_why_there_are_no_kernels(
    compiler: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library._load_library.cache_clear()
    library._kernels_up_to.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)
    try:
        with caplog.at_level(logging.WARNING):
            assert load_kernels() is None  # what the compiler wrote is no library
            assert load_kernels() is None
    finally:
        library._load_library.cache_clear()
        library._kernels_up_to.cache_clear()
    assert len(caplog.records) == 1
    assert "CPU kernels are not used" in caplog.text


def test_the_variable_turns_kernels_off_or_limits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert load_kernels() is None
    monkeypatch.setenv(VARIABLE, "portable")
    kernels = load_kernels()
    assert kernels is None or kernels.instruction_set == INSTRUCTION_SETS[0]
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(InputError, match="QWEN2VL_KERNELS: got 'fast', must be off, portable, "):
        load_kernels()


def library_of(compiler: list[str], name: str) -> str:
    """Return the path of a library of the compiler, or its name if it has none."""
    command = [*compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_description_compiles_nothing(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert describe_kernels() == "compiled at first use"
    assert not (tmp_path / "log").exists()
    build()
    monkeypatch.setenv(VARIABLE, "off")
    assert describe_kernels() == "none: QWEN2VL_KERNELS=off"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert describe_kernels().startswith("none: no C++ compiler")


@pytest.mark.slow
def test_the_address_sanitizer_finds_nothing(tmp_path: Path) -> None:
    """The tests of the operators pass in a build that checks every access to memory."""
    program = build_module._find_compiler()
    # Also the standard library: the sanitizer looks for its functions before torch loads it.
    preloaded = [library_of(program, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(Path(path).is_absolute() for path in preloaded):
        pytest.skip("this compiler has no address sanitizer")
    flags = [*build_module.FLAGS, "-g", "-fsanitize=address"]
    target = tmp_path / "kernels.so"
    source = build_module.SOURCE / "kernels.cpp"
    subprocess.run([*program, *flags, str(source), "-o", str(target)], check=True)
    code = (
        "import sys, pathlib, pytest; from qwen2vl.linear.cpu import build; "
        f"build.PREBUILT = pathlib.Path({str(target)!r}); "
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-k', "
        "'not compile and not fork', 'tests/linear/cpu/test_operators.py']))"
    )
    # Memory that the interpreter never frees is not what is looked for.
    options = {"LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | options,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[100%]" in done.stdout
