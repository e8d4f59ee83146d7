"""Clients: the commands they are given, and one sentence for each way in which they fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen2vl.fetch import FetchError, clients
from qwen2vl.fetch.clients import command_line, download_package
from tests.fetch.archives import CLIENTS, Registry, changed, make_package, package_data

every_client = pytest.mark.parametrize("client", CLIENTS)
PYTHON = sys.executable  # a test replaces it


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder"
    path.mkdir()
    return path


def error_of(folder: Path, client: str = "npm", **options: float) -> str:
    with pytest.raises(FetchError) as raised:
        download_package(make_package(client), folder, **options)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 1000
    return text


def wait_for(path: Path) -> str:
    """Return the text of a file that another process writes, as soon as it is there."""
    end = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return path.read_text().strip()


def is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@every_client
def test_a_package_is_downloaded_and_verified(
    registry: Registry, folder: Path, client: str
) -> None:
    package = make_package(client)
    registry.publish(package, package_data(client, b"round"))
    assert download_package(package, folder) == folder / package.file
    (call,) = registry.calls
    expected = {
        "pip": f"-m pip download --no-deps --only-binary=:all: --no-input --progress-bar=off "
        f"--disable-pip-version-check -d {folder} shapes==1.0",
        "npm": f"pack --pack-destination {folder} --ignore-scripts --loglevel=error shapes@1.0",
        "apt-get": "-qq download shapes=1.0",
    }
    assert call == expected[client]


def test_pip_is_told_the_platform_of_a_binary_package(folder: Path) -> None:
    file = "x-1.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
    line = command_line(changed(make_package("pip"), file=file), folder)
    assert line[:4] == [sys.executable, "-m", "pip", "download"]
    assert " ".join(line).endswith(
        "--implementation cp --python-version 311 --abi cp311 --platform manylinux_2_24_x86_64 "
        f"--platform manylinux_2_28_x86_64 -d {folder} shapes==1.0"
    )


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("pip", "pip is not installed in this Python; run `{python} -m ensurepip`"),
        ("npm", "npm is not installed; install Node.js"),
        ("apt-get", "apt-get does not exist here: the package is Debian's"),
    ],
)
def test_a_missing_client_is_said_with_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, client: str, message: str
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(clients, "find_spec", lambda _: None)
    text = error_of(folder, client)
    assert text.startswith(f"shapes 1.0: {message.format(python=sys.executable)}")
    assert text.endswith(
        f"or download {make_package(client).file} on another machine and give its folder by --from"
    )


@every_client
def test_another_file_is_deleted_and_refused(registry: Registry, folder: Path, client: str) -> None:
    package = make_package(client)
    registry.publish(package, package_data(client, b"evil!"))
    text = error_of(folder, client)
    assert f"must be {package.num_bytes:,} bytes with {package.sha256}" in text
    assert text.endswith("it was deleted and not unpacked")
    assert not list(folder.iterdir())


def test_another_version_is_refused(registry: Registry, folder: Path) -> None:
    package = make_package("npm")
    registry.publish(package, package_data("npm", b"round"), file="shapes-1.1.tgz")
    assert f"npm wrote shapes-1.1.tgz, must be {package.file}" in error_of(folder)


def test_no_file_at_all_is_refused(registry: Registry, folder: Path) -> None:
    registry.set_client("npm", "exit 0")
    assert "npm wrote no file, must be shapes-1.0" in error_of(folder)


@pytest.mark.parametrize(
    ("client", "output", "quoted"),
    [
        ("pip", "WARNING: slow\nERROR: No matching\nERROR: none", "1: No matching | none; check"),
        ("npm", "npm error code E404\nnpm error 404 no", "1: code E404 | 404 no; check the net"),
        ("apt-get", "W: a\nE: Broken pipe", "1: Broken pipe; check the network"),
        ("npm", "one\ntwo\nthree\nfour", "1: two | three | four; check the network"),
        ("npm", "", "1: no output; check the network and the configuration of npm"),
        ("npm", "error https://ada:secret@mirror/x", "1: https://***@mirror/x; check"),
        ("npm", r"\033[31mred\007", "1: ?[31mred?; check"),
    ],
)
def test_errors_of_a_client_are_quoted(
    registry: Registry, folder: Path, client: str, output: str, quoted: str
) -> None:
    registry.set_client(client, f"printf '{output}\\n' >&2; exit 1")
    text = error_of(folder, client)
    assert f"{client} failed with exit code {quoted}" in text


def test_long_output_is_cut(registry: Registry, folder: Path) -> None:
    registry.set_client("npm", "yes 'a line of no use' | head -c 3000000 >&2; exit 3")
    assert "exit code 3: a line" in error_of(folder)
    registry.set_client("npm", "head -c 3000000 /dev/zero | tr '\\0' x; exit 3")
    assert "xxx...; check" in error_of(folder)


@pytest.mark.parametrize(
    "output", ["E: Version '1.0' for 'shapes' was not found", "E: Unable to locate package shapes"]
)
def test_a_debian_version_of_another_release_is_explained(
    registry: Registry, folder: Path, output: str
) -> None:
    registry.set_client("apt-get", f'test "$LC_ALL" = C && echo "{output}"; exit 100')
    text = error_of(folder, "apt-get")
    assert "do not have this version, which is that of Debian 12 (bookworm)" in text
    assert "run `apt-get update` once" in text
    assert "--from" in text


def test_a_client_that_cannot_be_started_is_named(registry: Registry, folder: Path) -> None:
    registry.set_client("npm", "#!/no/such/interpreter")
    assert re.search(r"npm cannot be started: No such file", error_of(folder))


def test_a_client_that_hangs_is_killed_with_its_children(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    registry.set_client("npm", f"sleep 60 & echo $! >{tmp_path}/child; wait")
    assert "did not end within 1 s and was killed" in error_of(folder, timeout=1.0)
    child = (tmp_path / "child").read_text().strip()
    end = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_interrupt_ends_the_client(registry: Registry, folder: Path) -> None:
    registry.set_client("npm", "exec sleep 60")
    code = (
        "import subprocess, sys, pathlib\n"
        "from qwen2vl.fetch.clients import download_package\n"
        "from tests.fetch.archives import make_package\n"
        "wait = subprocess.Popen.wait\n"
        "def announced_wait(self, timeout=None):\n"
        "    print(self.pid, flush=True)\n"
        "    return wait(self, timeout)\n"
        "subprocess.Popen.wait = announced_wait\n"
        "download_package(make_package('npm'), pathlib.Path(sys.argv[1]))"
    )
    with subprocess.Popen(
        [PYTHON, "-c", code, str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        client = process.stdout.readline().strip()
        assert is_running(client)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert not is_running(client)


def test_a_client_gets_no_stdin_and_the_users_environment(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", "of the user")
    registry.set_client("npm", 'read line; echo "error [$line] $npm_config_registry" >&2; exit 1')
    reader, writer = os.pipe()
    os.write(writer, b"typed\n")
    stdin = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert "exit code 1: [] of the user;" in error_of(folder)
    finally:
        os.dup2(stdin, 0)
        for descriptor in (stdin, reader, writer):
            os.close(descriptor)
