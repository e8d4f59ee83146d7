"""Compiles the C++ kernels with the system's compiler, once, into the user's cache folder.

The file name is a hash of the source, the compiler's version and the flags; a compiler is looked
for in CXX and then as c++, g++ and clang++. One file holds the code for every instruction set of
the processor's family: which one runs is decided when it is loaded. A package for one platform has
the compiled file (`PREBUILT`, `make binary`), and then nothing is compiled.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from qwen2vl.files import atomic_file, user_cache_dir

__all__ = ["PREBUILT", "BuildError", "build", "build_for_distribution", "library_path"]

SOURCE = Path(__file__).with_name("kernels")
PREBUILT = SOURCE / "kernels.so"

COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++20", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # A result depends on the instruction set only where the source says so.
    *("-ffp-contract=off", "-fno-math-errno"),
)
# The C++ library of another machine may be older.
DISTRIBUTION_FLAGS = ("-static-libstdc++", "-static-libgcc", "-s")
TIMEOUT = 120  # seconds; it takes 3 to 10


class BuildError(Exception):
    """The kernels could not be compiled; the message is one line, with the remedy."""


def build() -> Path:
    """Return the compiled library, compiling it if that has not been done on this machine.

    Raises:
        BuildError: there is no compiler, it failed, or the cache folder cannot be written.
    """
    library = library_path()
    if not library.is_file():
        try:
            with atomic_file(library) as temporary:
                _compile(_find_compiler(), temporary)
        except OSError as error:
            raise BuildError(
                f"{library.parent}: {error.strerror or error}; set XDG_CACHE_HOME to a folder that "
                "can be written"
            ) from error
    return library


def build_for_distribution(library: Path) -> None:
    """Compile a library that runs on other machines of this platform.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    _compile(_find_compiler(), library, DISTRIBUTION_FLAGS)


def library_path() -> Path:
    """Return where the compiled library is or will be.

    Raises:
        BuildError: it is not in the package, and there is no compiler.
    """
    if PREBUILT.is_file():
        return PREBUILT
    return user_cache_dir() / "kernels" / f"kernels-{_digest(_find_compiler())}.so"


def _find_compiler() -> list[str]:
    """Return the compiler's command: CXX may have arguments, such as `ccache g++`."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in COMPILERS]:
        if program := shutil.which(command[0]):
            return [program, *command[1:]]
    wanted = given[0] if given else ", ".join(COMPILERS)
    raise BuildError(f"no C++ compiler ({wanted}) was found; install g++, or set CXX")


def _digest(compiler: list[str]) -> str:
    """Hash what the compiled file depends on."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=False, timeout=TIMEOUT
    ).stdout
    digest = hashlib.sha256(repr((compiler, FLAGS, sys.platform)).encode() + version)
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], library: Path, more_flags: tuple[str, ...] = ()) -> None:
    source = str(SOURCE / "kernels.cpp")
    command = [*compiler, *FLAGS, *more_flags, source, "-o", str(library)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler[0]} did not end within {TIMEOUT} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise BuildError(f"{compiler[0]} failed: {lines[0].strip()[:200]}")
