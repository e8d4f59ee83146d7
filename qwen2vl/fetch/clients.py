"""Downloads one package by the client of its registry, and verifies its checksum.

    pip        PYTHON -m pip download --no-deps --only-binary=:all: NAME==VERSION -d FOLDER
    npm        npm pack NAME@VERSION --pack-destination FOLDER
    apt-get    apt-get download NAME=VERSION

Clients run without a shell, with the user's configuration and environment, in an empty folder, for
a limited time. Their output is only read if they fail, and a few lines of it are quoted.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from qwen2vl.errors import Qwen2VLError
from qwen2vl.fetch.catalog import Package

__all__ = ["FetchError", "command_line", "download_package", "verify_package"]

TIMEOUT = 1800.0  # seconds a package
OUTPUT_BYTES = 16_384  # of a client's output that are read, from its end
QUOTED_LINES = 3  # of it in an error
QUOTED_CHARACTERS = 300
DEBIAN_RELEASE = "Debian 12 (bookworm)"  # whose versions packages.json pins

_ERROR_LINE = re.compile(r"(?:ERROR|error|npm error|npm ERR!|E)\b:?\s*(.+)")
_NOT_FOUND = re.compile(r"was not found|Unable to locate package|Can't find a source")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")

_MISSING = {
    "pip": "pip is not installed in this Python; run `{python} -m ensurepip`",
    "npm": "npm is not installed; install Node.js (Debian, Ubuntu: apt-get install npm)",
    "apt-get": "apt-get does not exist here: the package is Debian's",
}


class FetchError(Qwen2VLError):
    """A package cannot be downloaded or unpacked, or is not the pinned one."""


def download_package(package: Package, folder: Path, *, timeout: float = TIMEOUT) -> Path:
    """Download a package into an empty folder and return the verified file.

    Args:
        package: what to download.
        folder: where the client runs and writes; it must be empty.
        timeout: seconds after which the client is killed.

    Raises:
        FetchError: the client is missing or fails, or what it wrote is not the pinned file, which
            is then deleted.
    """
    command = command_line(package, folder)
    with tempfile.TemporaryFile() as output:
        try:
            code = _run(command, folder, output, timeout)
        except OSError as error:
            raise FetchError(f"{command[0]} cannot be started: {error.strerror}") from error
        text = _end_of(output)
    if code is None:
        raise FetchError(
            f"{_title(package)}: {package.client} did not end within {timeout:,.0f} s and was "
            f"killed; {_remedy(package)}"
        )
    if code != 0:
        raise FetchError(_failure_message(package, code, text))
    written = sorted(path.name for path in folder.iterdir())
    if written != [package.file]:
        raise FetchError(
            f"{_title(package)}: {package.client} wrote {', '.join(written[:3]) or 'no file'}, "
            f"must be {package.file}; {_remedy(package)}"
        )
    path = folder / package.file
    try:
        verify_package(package, path)
    except FetchError as error:
        path.unlink()
        raise FetchError(f"{error}; it was deleted and not unpacked") from None
    return path


def verify_package(package: Package, path: Path) -> None:
    """Compare a file's size and SHA-256 with the pinned ones.

    Raises:
        FetchError: they differ, or the file cannot be read.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FetchError(f"{path}: cannot be read: {error.strerror}") from error
    if (num_bytes, sha256) != (package.num_bytes, package.sha256):
        raise FetchError(
            f"{package.file}: {num_bytes:,} bytes with SHA-256 {sha256}, must be "
            f"{package.num_bytes:,} bytes with {package.sha256}: another file than the one that "
            f"{package.name} {package.version} was pinned to; try another mirror of the registry"
        )


def command_line(package: Package, folder: Path) -> list[str]:
    """Return the command that downloads a package into a folder.

    Raises:
        FetchError: the client is not installed; the message says what to install.
    """
    name, version = package.name, package.version
    if package.client == "pip":
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off"]
        options += ["--disable-pip-version-check", *_platform_options(package.file)]
        return [*_pip(package), "download", *options, "-d", str(folder), f"{name}=={version}"]
    program = shutil.which(package.client)
    if program is None:
        raise FetchError(_missing_message(package))
    if package.client == "npm":
        options = ["--pack-destination", str(folder), "--ignore-scripts", "--loglevel=error"]
        return [program, "pack", *options, f"{name}@{version}"]
    return [program, "-qq", "download", f"{name}={version}"]


def _pip(package: Package) -> list[str]:
    if find_spec("pip") is None:  # uv makes environments without it
        raise FetchError(_missing_message(package))
    return [sys.executable, "-m", "pip"]


def _platform_options(file: str) -> list[str]:
    """Return pip's options for a .whl file of one platform, whose data are used on any."""
    python, abi, platforms = Path(file).stem.split("-")[-3:]
    if platforms == "any":
        return []
    tags = ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
    return [*tags, *(word for name in platforms.split(".") for word in ("--platform", name))]


def _run(command: Sequence[str], folder: Path, output: IO[bytes], timeout: float) -> int | None:
    """Run a client; return its exit code, None if it was killed after the timeout."""
    # Messages of apt-get, which are matched, are translated otherwise.
    environment = {**os.environ, "LC_ALL": "C", "LANGUAGE": ""}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, which also has the client's own children
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # after the timeout, or an interrupt
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - OUTPUT_BYTES))
    return output.read().decode("utf-8", errors="replace")


def _failure_message(package: Package, code: int, output: str) -> str:
    if package.client == "apt-get" and _NOT_FOUND.search(output):
        return (
            f"{_title(package)}: the package lists of apt-get do not have this version, which is "
            f"that of {DEBIAN_RELEASE}; run `apt-get update` once; apt sources of another release "
            f"have another version: there, {_other_way(package)}"
        )
    return (
        f"{_title(package)}: {package.client} failed with exit code {code}: "
        f"{_quote(output)}; {_remedy(package)}"
    )


def _quote(output: str) -> str:
    """Return the first errors of a client's output, or else its last lines, in one line."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
    text = " | ".join(errors[:QUOTED_LINES] or lines[-QUOTED_LINES:] or ["no output"])
    text = _CREDENTIALS.sub("***@", text)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}..."


def _missing_message(package: Package) -> str:
    missing = _MISSING[package.client].format(python=sys.executable)
    return f"{_title(package)}: {missing}; or {_other_way(package)}"


def _title(package: Package) -> str:
    return f"{package.name} {package.version}"


def _remedy(package: Package) -> str:
    return (
        f"check the network and the configuration of {package.client} (registry, proxy), then "
        f"repeat; or {_other_way(package)}"
    )


def _other_way(package: Package) -> str:
    return f"download {package.file} on another machine and give its folder by --from"
